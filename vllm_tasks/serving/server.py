"""vLLM's OpenAI server as a process that a supervisor starts, and that ends with the supervisor.

It is run by path (see `vllm_tasks.engines.session`). Its argument is the supervisor's pid. The server's own
arguments arrive as a JSON list on standard input, because every user of the machine can read a command line.
vLLM's processes import this file too, so each of them requests AMX and ends with its parent.
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
