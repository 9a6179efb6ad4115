"""The rows of a run that were read and are not committed yet, and the bounds on them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_tasks.datalayer.selection import Key
from vllm_tasks.rows import Request, Result, RowError

HELD = 128 * 2**20
"""Bytes of prompts under way and of answers not committed, beyond which no more rows are read. In memory a
prompt is there up to three times while it is sent: as it was read, as JSON, in the socket."""


def bytes_of_request(request: Request | RowError) -> int:
    """Memory of a prompt, about."""
    return 0 if isinstance(request, RowError) else _bytes(request.prompt)


def bytes_of_answer(answer: Result) -> int:
    """Memory of the texts of an answer, about."""
    if isinstance(answer, RowError):
        return sys.getsizeof(answer.message)
    return sum(sys.getsizeof(choice.text) for choice in answer.choices)


def _bytes(value: Any) -> int:
    """Of the texts in a prompt; the rest of it is small beside them where it matters."""
    if isinstance(value, str):
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, Sequence) else 0


@dataclass
class Open:
    """The rows between source and commit; all threads meet here."""

    keys: set[Key] = field(default_factory=set)
    unanswered: int = 0
    held: int = 0
    """Bytes of what was handed over and is neither answered nor committed."""
    stopped: bool = False
    _wanted: tuple[int, int, int] | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_capacity(self, unanswered: int, uncommitted: int, size: int) -> bool:
        """Wait until fewer rows than these are open and `size` bytes have room; False when the run stops.

        What is larger than all the room there is goes alone.
        """
        with self._changed:
            self._wanted = unanswered, uncommitted, size
            self._changed.wait_for(self._has_room)
            self._wanted = None
            return not self.stopped

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the run stops."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped, seconds)

    def _has_room(self) -> bool:
        if self._wanted is None:
            return False
        unanswered, uncommitted, size = self._wanted
        fits = self.held + size <= HELD or not self.keys
        return self.stopped or (fits and self.unanswered < unanswered and len(self.keys) < uncommitted)

    def _tell(self) -> None:
        if self._has_room():  # not for every row: waking the reader costs more than the row
            self._changed.notify_all()

    def read(self, keys: Collection[Key], size: int) -> Key | None:
        """Add rows of `size` bytes; a key that is open already is returned, and none is added then."""
        with self._changed:
            seen: set[Key] = set()
            for key in keys:
                if key in self.keys or key in seen:
                    return key
                seen.add(key)
            self.keys |= seen
            self.unanswered += len(seen)
            self.held += size
            return None

    def answered(self, size: int) -> None:
        """One row has an answer of `size` bytes."""
        with self._changed:
            self.unanswered -= 1
            self.held += size
            self._tell()

    def sent(self, size: int) -> None:
        """Prompts of `size` bytes are all answered: nobody holds them any more."""
        with self._changed:
            self.held -= size
            self._tell()

    def committed(self, keys: Iterable[Key], size: int) -> None:
        """The rows with these keys are done, whose answers had `size` bytes."""
        with self._changed:
            self.keys.difference_update(keys)
            self.held -= size
            self._tell()

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def snapshot(self) -> set[Key]:
        """The keys of all open rows."""
        with self._changed:
            return set(self.keys)
