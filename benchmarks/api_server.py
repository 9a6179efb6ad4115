"""vLLM's OpenAI server, with AMX permitted in all its processes (see `permit_amx`).

python -m benchmarks.api_server --model ...
"""

import runpy

from vllm_tasks.engines.session import permit_amx

permit_amx()  # also in the processes that vLLM spawns, because they import this main module

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
