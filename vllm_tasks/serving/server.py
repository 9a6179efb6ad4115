"""vLLM's OpenAI server as a process that a supervisor starts, and that ends with it.

Run by its path (see `vllm_tasks.engines.session`): the supervisor's pid is its argument, the server's own
arguments come as a JSON list on standard input, since a command line can be read by every user of the
machine. vLLM's processes import this file too, which gives them AMX and lets each end with its parent.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_tasks.engines import session
else:  # which would import the package
    session = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "engines/session.py")))

if __name__ == "__main__":
    session.permit_amx()
    session.watch(int(sys.argv[1]))
    sys.argv[1:] = json.load(sys.stdin)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
elif __name__ == "__mp_main__":
    session.permit_amx()
    session.watch(os.getppid())
