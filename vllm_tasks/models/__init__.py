"""The two models, `VllmAPI` and `VllmModel`: Prefect blocks that say what to prompt, and how."""

from vllm_tasks.models.api import VllmAPI
from vllm_tasks.models.local import VllmModel

__all__ = ["VllmAPI", "VllmModel"]
