"""A replacement of `host.py` for P11 that sleeps instead of using a GPU, so many engines fit on one machine.

It works on `seqs` rows at once, each for `seconds` (both are engine arguments); the other rows wait.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from typing import Any

ANSWER = {
    "choices": [{"text": "The answer is 42. " * 8, "finish_reason": "stop", "token_ids": [1] * 48}],
    "usage": {"prompt_tokens": 60, "completion_tokens": 48},
}


async def serve(channel: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=channel)

    def write(frame: dict[str, Any]) -> None:
        data = json.dumps(frame).encode()
        writer.write(struct.pack("!I", len(data)) + data)

    async def read() -> dict[str, Any]:
        (size,) = struct.unpack("!I", await reader.readexactly(4))
        frame: dict[str, Any] = json.loads(await reader.readexactly(size))
        return frame

    async def answer(row: int) -> None:
        async with slots:
            await asyncio.sleep(seconds)
        write({"row": row, "answer": ANSWER, "seconds": 1.0})

    arguments = await read()
    slots, seconds = asyncio.Semaphore(arguments["seqs"]), arguments["seconds"]
    write({"ready": {"vllm": "slow", "ranks": 1, "max_num_seqs": arguments["seqs"], "max_model_len": 1024}})
    running: set[asyncio.Task[None]] = set()
    while True:
        try:
            frame = await read()
        except asyncio.IncompleteReadError:
            return
        for row, _ in frame.get("chunk", []):
            task = asyncio.create_task(answer(row))
            running.add(task)
            task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))
