"""Keys of CSV records with too many or too few cells, if no other record has the same key.

A line break that should be in quotes turns each line of a text into a record: `Regards` is one, and may occur
often. The cells in the key's position there must not count against the rows of the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks.datalayer.sources.keys import known, listed
from vllm_tasks.errors import InvalidCall

MOST = 1 << 20
"""Maximum number of different keys of such records, which are in memory."""
Key = tuple[object, ...]


class Strays:
    """Keys of bad records: first `add` all of them, then `without` those of good records."""

    def __init__(self) -> None:
        self._seen: Counter[Key] = Counter()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, keys: pa.Table, where: str) -> None:
        """Add keys; raises `InvalidCall` for too many, naming the place `where` of the latest one."""
        self._seen.update(listed(keys, known(keys)))
        if len(self._seen) > MOST:
            raise InvalidCall(
                f"more than {MOST:,} records have too many or too few cells, the latest at {where}; give the "
                "delimiter, the quote or the header: read={table: {'delimiter': ';'}}"
            )

    def without(self, good: Iterable[pa.Table], key: pa.Schema) -> set[Key]:
        """The keys that occur once and in none of the tables `good`; all have the types of `key`."""
        lone = {key for key, times in self._seen.items() if times == 1}
        first = pa.array(list({key[0] for key in lone}), key[0].type)
        for keys in good:
            if not lone:
                break
            alike = pc.indices_nonzero(pc.is_in(keys[0], value_set=first))
            lone -= set(listed(keys, alike))
        return lone
