"""Stores for tests: a lake, SQLite or PostgreSQL, each real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from vllm_tasks import Datalayer

KINDS = ("lake", "sqlite", "postgres")


@dataclass(frozen=True)
class Place:
    """A datalayer's URL with a source table `rows` (columns `id` and `text`)."""

    url: str

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return {"sqlite": "sqlite", "postgresql": "postgres"}.get(self.url.partition(":")[0], "lake")

    @property
    def db(self) -> Datalayer:
        return Datalayer(url=self.url)

    def fill(self, rows: Sequence[dict[str, Any]]) -> None:
        """Make the source, or replace it."""
        if "://" not in self.url:
            Path(self.url).mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(list(rows)), Path(self.url) / "rows.parquet")
            return
        engine = sa.create_engine(self.url.replace("postgresql:", "postgresql+psycopg:"))
        table = sa.Table(
            "rows",
            sa.MetaData(),
            # Without autoincrement 0 is a key in MariaDB, too.
            sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
            sa.Column("text", sa.Text),
        )
        with engine.begin() as connection:
            table.drop(connection, checkfirst=True)
            table.create(connection)
            connection.execute(table.insert(), list(rows))
        engine.dispose()

    def fill_texts(self, *texts: str | None) -> None:
        """Rows with the ids 0, 1, ..."""
        self.fill([{"id": i, "text": text} for i, text in enumerate(texts)])

    def outputs(self, predict_id: str = "m") -> list[dict[str, Any]]:
        """The committed rows in the order of their keys and positions."""
        rows: list[dict[str, Any]] = self.db.outputs(predict_id).to_pylist()
        return sorted(rows, key=lambda row: (row["id"], row.get("_position") or 0))

    def answers(self, predict_id: str = "m") -> dict[int, Any]:
        """The output by key; fails the test when a key is there twice."""
        rows = self.outputs(predict_id)
        answers = {row["id"]: row["output"] for row in rows}
        assert len(answers) == len(rows), "a key is there twice"
        return answers
