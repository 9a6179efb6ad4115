"""The two models, which are Prefect blocks: what to prompt, and how."""

from vllm_tasks.models.api import VllmAPI
from vllm_tasks.models.local import VllmModel

__all__ = ["VllmAPI", "VllmModel"]
