"""One vLLM server for all users of a machine."""

from vllm_tasks.serving.api import serve

__all__ = ["serve"]
