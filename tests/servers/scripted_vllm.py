"""Replaces `serving/server.py` for behaviour that vLLM's server does not show on demand.

Answers each prompt with itself, if the request has the key. Its arguments come as a model's `vllm_kwargs`:
`record` (a file with a line for each start, and a line if another server of the record still lives),
`lives` (later starts fail), `refuse` (the message of a failing start), `wait` (seconds before it listens).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "scripted", "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.answer(400, {"error": {"message": "you must provide a chat template"}})
            return
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.answer(401, {"error": "Unauthorized"})
            return
        choice = {"text": body["prompt"], "finish_reason": "stop", "index": 0}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        self.answer(200, {"model": body["model"], "choices": [choice], "usage": usage})

    def answer(self, status: int, words: object) -> None:
        content = json.dumps(words).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    Path(os.environ["VLLM_RPC_BASE_PATH"]).rmdir()  # vLLM's sockets would be there
    os._exit(1)


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> None:
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    pairs = (word.removeprefix("--").split("=", 1) for word in json.load(sys.stdin) if "=" in word)
    arguments = dict(pairs)
    record = Path(arguments["record"])
    before = record.read_text().split() if record.exists() else []
    with record.open("a") as file:
        file.write("".join(f"TWO {pid}\n" for pid in before if lives(pid)) + f"{os.getpid()}\n")
    if "refuse" in arguments or len(before) >= int(arguments.get("lives", 1000)):
        words = arguments.get("refuse", "no more lives")
        print(f"Traceback (most recent call last):\nValueError: {words}", flush=True)
        sys.exit(1)
    time.sleep(float(arguments.get("wait", 0)))
    ThreadingHTTPServer(("127.0.0.1", int(arguments["port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
