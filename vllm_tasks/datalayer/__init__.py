"""Where tables live: a lake (a folder or fsspec URL) or a database (a SQLAlchemy URL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar, Self

from prefect.blocks.core import Block
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    field_validator,
    model_validator,
)

from vllm_tasks.datalayer.arguments import named_columns
from vllm_tasks.datalayer.block_fields import OF_BLOCK, not_masked, not_shown, own_fields, validated
from vllm_tasks.datalayer.selection import REVIEW
from vllm_tasks.datalayer.table_names import check_name, outputs_name, reviews_name
from vllm_tasks.errors import InvalidCall
from vllm_tasks.places import check_place, without_secrets

if TYPE_CHECKING:
    import pyarrow

    from vllm_tasks.datalayer.database.database import Database
    from vllm_tasks.datalayer.lake.lake import Lake
    from vllm_tasks.datalayer.sources import Source

DUCKDB = "duckdb:///"
"""Prefix of the URL of a DuckDB file."""


class Datalayer(Block):
    """Tables to read rows from and to write outputs to.

    A path or an fsspec URL (`data/`, `s3://bucket/folder`) is a lake: its files are tables, and outputs are
    Delta tables. A SQLAlchemy URL (`sqlite:///file.db`, `postgresql://user@host/name`) is a
    database. The credentials of object stores come from the environment (`AWS_ACCESS_KEY_ID`, ...).
    """

    _block_type_name = "vLLM Datalayer"
    _block_type_slug = "vllm-datalayer"
    _description = "Tables for vLLM predictions: a folder, an fsspec URL or a SQLAlchemy URL."

    _documentation_url: ClassVar[Any] = "https://docs.sqlalchemy.org/en/20/core/engines.html"
    _code_example = """
        ```python
        from vllm_tasks import Datalayer

        db = Datalayer.load("BLOCK_NAME")
        answers = db.outputs("my-model")
        ```
        """

    model_config = OF_BLOCK

    url: SecretStr = Field(
        title="URL",
        description="A folder or an fsspec URL (/data/tickets, s3://bucket/tickets), or a SQLAlchemy URL "
        "(postgresql://user:password@host/name). Kept secret, as it may hold a password.",
    )

    read: dict[str, dict[str, Any]] = Field(
        default={},
        title="Read options",
        description="How the text files of a lake are read, by table, as in "
        '{"tickets": {"delimiter": ";", "encoding": "latin-1"}}; also escape, quote, header, null_values.',
    )

    @model_validator(mode="before")
    @classmethod
    def _own_fields(cls, data: Any) -> Any:
        return own_fields(data)

    @model_validator(mode="wrap")
    @classmethod
    def _without_secrets(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Hide all input in errors: a URL with a password may be in any field."""
        return validated(data, handler, not_shown)

    @field_validator("url")
    @classmethod
    def _some_url(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().strip():
            raise ValueError("the url is empty; give a folder, an fsspec URL or a SQLAlchemy URL")
        not_masked("url", value.get_secret_value())
        return value

    @field_validator("read")
    @classmethod
    def _some_options(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        from vllm_tasks.datalayer.sources.read_options import read_options

        for table, given in value.items():
            read_options(table, given)
        return value

    def outputs(
        self,
        predict_id: str,
        *,
        table: str | None = None,
        source: str | None = None,
        primary_id: str | Sequence[str] = "id",
    ) -> pyarrow.Table:
        """Read the committed outputs of `predict_id`, each key exactly once.

        Args:
            predict_id: The name that the call gave its outputs.
            table: The outputs' table, if the model's `model_update_kwargs` name one.
            source: A table, path or SELECT here that the outputs were made from. If given, the result has
                all its rows, in its order: first their columns, then those of their outputs, NULL for rows
                without one.
            primary_id: The key of the source's rows.

        Returns:
            A `pyarrow.Table` with these columns: the key, the output's columns and those of `keep`,
            `_position` when flattened, `_error`, `_finish_reason`, `_prompt_tokens`, `_completion_tokens`,
            `_seconds`, `_model`, `_uuid`, `_fingerprint`, `_input_hash`, `_created_at`, `_source`. If rows
            can be marked for review, a person's label replaces the model's in `label`, and `_reviewed_at`
            has the time at which it was given.

        Raises:
            InvalidCall: There are no such outputs.
            TablesUnavailable: The tables cannot be reached.
        """
        name = outputs_name(predict_id) if table is None else table
        check_name("table", name)
        key = named_columns("primary_id", primary_id)
        if source is not None and not isinstance(source, str):
            raise InvalidCall(
                f"source=<{type(source).__name__}> is not a text: give a table, a path or one SELECT "
                "statement of this datalayer"
            )
        tables = self.tables()
        try:
            found = self._reviewed(tables, name, predict_id if table is None else table)
            if source is None:
                return found
            from vllm_tasks.datalayer.beside import beside

            with closing(self.source(source)) as rows:
                return beside(rows, source, found, key)
        finally:
            tables.close()

    def reviews(self, predict_id: str, *, table: str | None = None) -> pyarrow.Table:
        """Read the outputs that are marked for review and that no person has answered.

        Args:
            predict_id: The name that the call gave its outputs.
            table: The outputs' table, if the model's `model_update_kwargs` name one.

        Returns:
            A `pyarrow.Table` with the columns of `outputs`, the least probable label first.

        Raises:
            InvalidCall: There are no such outputs, or they have no column `_review`.
            TablesUnavailable: The tables cannot be reached.
        """
        from vllm_tasks.datalayer import reviews

        return reviews.waiting(self.outputs(predict_id, table=table), predict_id)

    def answer_reviews(self, predict_id: str, labels: Mapping[Any, str], *, table: str | None = None) -> None:
        """Write the labels that a person gave to rows.

        They are kept in a table of their own, `_reviews__<predict_id>`, so that no later run removes them.
        `outputs` has them in place of the model's as long as the row's input is the same.

        Args:
            predict_id: The name that the call gave its outputs.
            labels: The label of each row, by its key (a tuple if the key has several columns).
            table: The outputs' table, if the model's `model_update_kwargs` name one.

        Raises:
            InvalidCall: There are no such outputs, they have no column `_review`, a key has no output, or a
                label is none of the classes.
            TablesUnavailable: The tables cannot be reached.
        """
        from vllm_tasks.datalayer import reviews

        found = self.outputs(predict_id, table=table)
        rows = reviews.answered(found, labels, predict_id)
        tables = self.tables()
        try:
            tables.put(reviews_name(predict_id if table is None else table), rows, reviews.key_of(found))
        finally:
            tables.close()

    def _reviewed(self, tables: Lake | Database, outputs: str, name: str) -> pyarrow.Table:
        """The outputs, with a person's answers in place of the model's."""
        found = tables.outputs(outputs)
        if REVIEW not in found.column_names:
            return found
        from vllm_tasks.datalayer import reviews

        given = reviews_name(name)
        return reviews.preferred(found, tables.outputs(given) if tables.has(given) else None)

    def tables(self) -> Lake | Database:
        """Open the lake or database.

        Returns:
            The tables; the caller closes them.

        Raises:
            InvalidCall: The URL is neither a lake nor a database that keeps outputs.
        """
        url = self._url
        if is_lake(url):
            check_place("the lake", url)
            from vllm_tasks.datalayer.lake.lake import Lake

            return Lake(url, self.read)
        if url.startswith(DUCKDB):
            raise InvalidCall(
                f"{without_secrets(url)!r:.200} cannot keep outputs: read from it with source=..., and use a "
                "lake, an SQLite file or PostgreSQL as db=..."
            )
        from vllm_tasks.datalayer.database.database import Database

        return Database(url)

    def source(self, select: str) -> Source:
        """Open a table, path or SELECT here for reading only.

        Besides lakes, SQLite and PostgreSQL, it reads DuckDB files and any SQLAlchemy dialect that streams.

        Args:
            select: The table, path or SELECT.

        Returns:
            The source; the caller closes it.

        Raises:
            InvalidCall: There is no such table, or it cannot be read.
        """
        url = self._url
        if is_lake(url):
            check_place("the lake", url)
            from vllm_tasks.datalayer.sources.files import Files
            from vllm_tasks.datalayer.sources.readers import Readers

            return Readers(Files(url), self.read).source(select)
        if url.startswith(DUCKDB):
            check_place("the database", url.removeprefix(DUCKDB))
            from vllm_tasks.datalayer.sources.duckdb_file import DuckDBSource

            return DuckDBSource(url, select)
        from vllm_tasks.datalayer.sources.sql import SqlSource

        return SqlSource(url, select)

    def shown(self, table: str) -> str:
        """The place of a table that is read here, as text for people.

        Args:
            table: The table's name.

        Returns:
            A path, or the table and its database, without secrets.
        """
        url = without_secrets(self._url)
        return f"{url.rstrip('/')}/{table}" if is_lake(self._url) else f"table {table} in {url}"

    @property
    def _url(self) -> str:
        return self.url.get_secret_value().strip()


def is_lake(url: str) -> bool:
    """Whether a URL names a lake.

    Args:
        url: A path or URL.

    Returns:
        True for a path and for a scheme that fsspec knows; all other URLs are SQLAlchemy's.
    """
    import fsspec

    scheme, separator, _ = url.partition("://")
    return not separator or scheme in fsspec.available_protocols()
