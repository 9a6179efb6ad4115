"""The order in which a database's rows are read, so that each query begins where the last one ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from vllm_tasks.datalayer.database.backends import Backend
from vllm_tasks.datalayer.database.relation import Relation

Place = Sequence[Any]
"""A `Backend.bound`: values of the columns of the order in one row."""


@dataclass(frozen=True)
class Order:
    """The rows of `source` ordered by `columns`: those of the key, in an index's order if there is one."""

    backend: Backend
    source: Relation
    key: pa.Schema
    columns: Sequence[str]
    kinds: dict[str, Any]
    """The types of the key's columns, from `Relation.kinds`."""
    indexed: bool
    """Whether an index has this order, so that each query finds its first row fast."""

    def query(self, columns: Sequence[str], after: Place | None) -> sa.Select[Any]:
        """The rows after `after` (None: all) with the key, these columns and the place of each."""
        place = self._place()
        found = [self.backend.as_key(self.source.rows.c[f.name], f.type) for f in self.key]
        found += [self.source.rows.c[name] for name in columns]
        found += self.backend.bound(place)
        rows = self.source.query(*(c.label(f"_c{i}") for i, c in enumerate(found))).order_by(*place)
        return rows if after is None else rows.where(self.behind(after))

    def behind(self, place: Place) -> sa.ColumnElement[bool]:
        """The condition that a row comes after `place`."""
        return self.backend.after(self._place(), [self.kinds[name] for name in self.columns], place)

    def _place(self) -> list[sa.ColumnElement[Any]]:
        return [self.source.rows.c[name] for name in self.columns]
