"""Steps that run on a work pool, where the model's engine is; their outcome comes back to the caller.

Only the engine needs GPUs. So prompts are made and answers decoded where the step is called: rows travel as
finished prompts and come back as answers. For a table, the call travels and the rows do not.
"""

from vllm_tasks.placement.requests import routed
from vllm_tasks.placement.table import check_shards, over_table
from vllm_tasks.placement.target import target_of
from vllm_tasks.placement.validation import validated

__all__ = ["check_shards", "over_table", "routed", "target_of", "validated"]
