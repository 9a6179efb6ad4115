"""vLLM's OpenAI server as a process that a keeper starts, and that ends with it.

Run by its path (see `vllm_tasks.engines.host`): the keeper's pid is its argument, the server's own
arguments come as a JSON list on standard input, since a command line can be read by every user of the
machine. vLLM's processes import this file too, which gives them AMX and lets each end with its parent.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path

PARENT_CHECKED_EVERY = 0.5
"""Seconds between two looks at whether the parent still lives."""

_spec = importlib.util.spec_from_file_location("vllm_tasks_host", Path(__file__).with_name("host.py"))
assert _spec is not None
assert _spec.loader is not None
host = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(host)


def end_with(parent: int) -> None:
    """Kill the whole session once the parent is gone: nobody is left who could end it in order."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECKED_EVERY)
    host.end_session(1)


def watch(parent: int) -> None:
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


if __name__ == "__main__":
    host.permit_amx()
    watch(int(sys.argv[1]))
    sys.argv[1:] = json.load(sys.stdin)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
elif __name__ == "__mp_main__":
    host.permit_amx()
    watch(os.getppid())
