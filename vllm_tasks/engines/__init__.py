"""The only interface to vLLM: an `Engine` processes rows, wherever it runs.

There are three: `http` (any server), `local` (a child process) and `ray` (such a process in an actor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_tasks.engines.window import Window
from vllm_tasks.rows import Request, Result

Done = Callable[[int, Result], None]
"""Called with the position of a request in its chunk, and its result."""


class Engine(Protocol):
    """Processes chunks of rows. All methods run on the engine loop (`vllm_tasks.engines.loop`)."""

    window: Window
    """Limits the rows in flight over all calls that share this engine; valid once it has started."""

    @property
    def has_failed(self) -> bool:
        """Whether the engine accepts no more rows, so that another one must be started."""

    async def start(self) -> None:
        """Make the engine ready for rows.

        Raises:
            EngineFailed: vLLM does not start; the message has its reason.
            ServerUnavailable: A server or a Ray cluster cannot be reached.
            InvalidCall: The configuration cannot work.
        """

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        """Process a chunk of requests and return when all of them are done.

        A failure of one row is its result, a `RowError`. Cancelling aborts the unfinished requests.

        Args:
            requests: The rows of the chunk.
            done: Called exactly once for each request as it finishes, in any order.

        Raises:
            InvalidCall: The call itself is wrong.
            EngineFailed: The engine died and cannot be restarted, or rows of this call keep killing it.
            ServerUnavailable: No server responded for the grace period.
        """

    async def has_chat_template(self) -> bool | None:
        """Report whether the model has a chat template.

        Returns:
            True if the engine can turn chat messages into a prompt; None if a server does not report it.
        """

    async def close(self) -> None:
        """Release all resources. `start` may be called again afterwards."""
