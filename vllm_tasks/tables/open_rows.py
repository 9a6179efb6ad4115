"""The rows of a run that were read but not committed yet, and the bounds on them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_tasks.datalayer.selection import Key
from vllm_tasks.rows import Request, Result, RowError

HELD = 128 * 2**20
"""Bytes of pending prompts and uncommitted answers beyond which no more rows are read. A prompt may be in
memory three times while it is sent: as it was read, as JSON, in the socket."""
NUMBER = 32
"""Bytes of a Python float in a list."""
TOKEN = 200
"""Bytes of a token with its log probability."""


def bytes_of_request(request: Request | RowError) -> int:
    """Approximate memory of a prompt in bytes."""
    return 0 if isinstance(request, RowError) else _bytes(request.prompt) + _bytes(request.record)


def bytes_of_answer(answer: Result) -> int:
    """Approximate memory of an answer's texts, log probabilities and numbers in bytes."""
    if isinstance(answer, RowError):
        return sys.getsizeof(answer.message)
    return sum(
        sys.getsizeof(choice.text)
        + (sys.getsizeof(choice.reasoning) if choice.reasoning else 0)
        + (sum(TOKEN * (1 + len(t.top)) for t in choice.logprobs) if choice.logprobs else 0)
        + NUMBER * len(choice.data or ())
        for choice in answer.choices
    )


def _bytes(value: Any) -> int:
    """Memory of the texts, bytes and token ids in a prompt; in one that is large, the rest is small."""
    if isinstance(value, str | bytes):
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, Sequence):
        return sum(map(_bytes, value))
    return sys.getsizeof(value) if isinstance(value, int) else 0


@dataclass
class OpenRows:
    """The rows between source and commit. All threads share it: every change is under `_changed`."""

    keys: set[Key] = field(default_factory=set)
    pending: int = 0
    held: int = 0
    """Bytes of pending prompts and uncommitted answers."""
    stopped: bool = False
    _wanted: tuple[int, int, int] | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_capacity(self, pending: int, uncommitted: int, size: int) -> bool:
        """Wait until fewer rows than these are open and `size` bytes fit; False when the run stops.

        Rows larger than the complete bound are processed alone.
        """
        with self._changed:
            self._wanted = pending, uncommitted, size
            self._changed.wait_for(self._has_capacity)
            self._wanted = None
            return not self.stopped

    def wait(self, seconds: float) -> None:
        """Wait for `seconds`, or until the run stops."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped, seconds)

    def _has_capacity(self) -> bool:
        if self._wanted is None:
            return False
        pending, uncommitted, size = self._wanted
        fits = self.held + size <= HELD or not self.keys
        return self.stopped or (fits and self.pending < pending and len(self.keys) < uncommitted)

    def _notify(self) -> None:
        if self._has_capacity():  # not after every row: waking the reader costs more than the row
            self._changed.notify_all()

    def read(self, keys: Collection[Key], size: int) -> Key | None:
        """Add rows of `size` bytes; if a key is open already, return it and add none."""
        with self._changed:
            seen: set[Key] = set()
            for key in keys:
                if key in self.keys or key in seen:
                    return key
                seen.add(key)
            self.keys |= seen
            self.pending += len(seen)
            self.held += size
            return None

    def completed(self, size: int) -> None:
        """Note that one row has an answer of `size` bytes."""
        with self._changed:
            self.pending -= 1
            self.held += size
            self._notify()

    def sent(self, size: int) -> None:
        """Release prompts of `size` bytes: all of them have answers."""
        with self._changed:
            self.held -= size
            self._notify()

    def committed(self, keys: Iterable[Key], size: int) -> None:
        """Remove committed rows, whose answers had `size` bytes."""
        with self._changed:
            self.keys.difference_update(keys)
            self.held -= size
            self._notify()

    def stop(self) -> None:
        """End all waits."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def snapshot(self) -> set[Key]:
        """The keys of all open rows."""
        with self._changed:
            return set(self.keys)
