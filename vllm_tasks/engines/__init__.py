"""The one seam to vLLM: an `Engine` answers rows, wherever it runs.

Three transports: `http` (somebody's server), `local` (a process of ours), `ray` (such a process in actors).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_tasks.engines.window import Window
from vllm_tasks.rows import Request, Result

Done = Callable[[int, Result], None]
"""Called with the position of a request in its chunk and what became of it."""


class Engine(Protocol):
    """Answers chunks of rows. All methods run on the engine loop (`vllm_tasks.engines.loop`)."""

    window: Window
    """Bounds the rows in flight over all calls that share this engine; set once it has started."""

    @property
    def has_failed(self) -> bool:
        """Whether no row will be taken any more, so that another engine has to be started."""

    async def start(self) -> None:
        """Make it ready to answer; raises `EngineFailed`, `ServerUnavailable` or `InvalidCall`."""

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        """Answer each request and call `done` exactly once for it, as rows finish, in any order.

        Returns when all are done. What is wrong with one row is its `RowError`; what is wrong
        with the call raises. Cancelling aborts the requests that are not done.
        """

    async def has_chat_template(self) -> bool:
        """Whether it makes a prompt of chat messages: there is a chat template for its model."""

    async def close(self) -> None:
        """Release everything; a later `start` begins anew."""
