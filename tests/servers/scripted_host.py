"""Replaces `engines/local/host.py` for behaviour that a real engine does not show on demand.

Reports that it is ready after `start` seconds (an engine argument), and answers each row with its prompt
after `pause` seconds. Some prompts are orders: `die` (on the first life only), `die always`, `hang` (on the
first life only), `hang always`, `trouble` (print a traceback and continue), `crash` (print one and report
that the engine is dead), `linger` (report that, and take long to end), `no adapter` (the call is wrong),
`refuse` (the row), `shout` (a line of 2 MiB), `devices` (answer with the visible GPUs), `workers` (answer
with the GPUs that it holds on Ray, as vLLM's Ray executor does). It starts `lives` times, then no more. Each
start, row and orderly end is logged as a line of the file `log`, which may begin with `file:`: a path alone
would count in the fingerprint with what the file holds.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    arguments = receive(channel)
    log = Path(arguments["log"].removeprefix("file:"))
    life = log.read_text().count("start\n") if log.exists() else 0
    note(log, "start")
    time.sleep(arguments.get("start", 0))
    if "refuse" in arguments or life >= arguments.get("lives", math.inf):
        print(
            "Traceback (most recent call last):\nValueError: " + arguments.get("refuse", "no more lives"),
            flush=True,
        )
        send(channel, {"failed": "RuntimeError: Engine core initialization failed. See root cause above."})
        return
    workers = on_ray(arguments) if arguments.get("distributed_executor_backend") == "ray" else ""
    facts = {"vllm": "scripted", "ranks": 1, "max_num_seqs": 4, "max_model_len": 100, "chat_template": False}
    send(channel, {"ready": facts})
    while frame := receive(channel):
        for row, prompt in frame.get("chunk", []):
            note(log, prompt)
            time.sleep(arguments.get("pause", 0))
            obey(prompt, life)
            if prompt in ("crash", "linger") and life == 0:
                send(channel, {"dead": "EngineDeadError: EngineCore encountered an issue."})
                time.sleep(0 if prompt == "crash" else 60)
                return
            if prompt in ("no adapter", "refuse"):
                wrong = {"kind": "refused", "message": "403"} if prompt == "refuse" else "there is no adapter"
                send(channel, {"row": row, "error" if prompt == "refuse" else "invalid": wrong})
                continue
            orders = {"devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "workers": workers}
            text = orders.get(prompt, prompt)
            choice = {"text": text, "finish_reason": "stop", "token_ids": [1]}
            usage = {"prompt_tokens": 1, "completion_tokens": 1}
            send(channel, {"row": row, "answer": {"choices": [choice], "usage": usage}, "seconds": 0.5})
    note(log, "end")


def on_ray(arguments: dict[str, Any]) -> str:
    """Hold a GPU for each worker as `initialize_ray_cluster` of vLLM does; "HERE: ALL", their numbers."""
    import ray

    ray.init(logging_level="ERROR")
    size = arguments["tensor_parallel_size"] * arguments.get("pipeline_parallel_size", 1)
    group = ray.util.placement_group([{"GPU": 1}] * size, strategy="PACK")
    if not group.wait(60):
        raise RuntimeError(f"no {size} GPUs")
    nodes = list(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
    here = nodes.count(os.environ["NODE"])
    return f"{here}: {' '.join(str(nodes.count(node)) for node in sorted(set(nodes)))}"


def obey(prompt: str, life: int) -> None:
    if prompt == "shout":
        print("x" * 2**21, flush=True)
    if prompt in ("trouble", "crash"):
        print(f"Traceback (most recent call last):\nValueError: {prompt}", flush=True)
    if prompt == "hang always" or (prompt == "hang" and life == 0):
        os.kill(os.getpid(), signal.SIGSTOP)
    if prompt == "die always" or (prompt == "die" and life == 0):
        os.kill(os.getpid(), signal.SIGKILL)


def note(log: Path, words: str) -> None:
    with log.open("a") as file:
        file.write(words + "\n")


def send(channel: socket.socket, frame: dict[str, Any]) -> None:
    data = json.dumps(frame).encode()
    channel.sendall(struct.pack("!I", len(data)) + data)


def receive(channel: socket.socket) -> dict[str, Any]:
    """The next frame; an empty one at the end."""
    head = channel.recv(4, socket.MSG_WAITALL)
    if len(head) < 4:
        return {}
    (size,) = struct.unpack("!I", head)
    frame: dict[str, Any] = json.loads(channel.recv(size, socket.MSG_WAITALL))
    return frame


if __name__ == "__main__":
    main()
