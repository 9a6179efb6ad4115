"""Where tables live: a lake (a folder or fsspec URL) or a database (a SQLAlchemy URL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from prefect.blocks.core import Block
from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails

from vllm_tasks.errors import InvalidCall
from vllm_tasks.places import check_place, without_secrets

if TYPE_CHECKING:
    import pyarrow

    from vllm_tasks.datalayer.database.database import Database
    from vllm_tasks.datalayer.lake.lake import Lake
    from vllm_tasks.datalayer.sources import Source

LOGO = "https://avatars.githubusercontent.com/u/136984999?s=200"
"""vLLM's."""
T = TypeVar("T")

DUCKDB = "duckdb:///"
"""What the URL of a DuckDB file begins with."""
OUTPUTS = "_outputs__"
"""What the name of every outputs table begins with."""
ODD = """/\\:*?"<>|#%[]^`"""
"""Characters that lead elsewhere, or that a URL, Delta or a shell would alter."""

LONGEST = 200
"""Bytes of a name; with what comes before it, a folder's name may have 255."""


def own_fields(data: Any) -> Any:
    """A block's fields: Prefect adds its type's slug to a block that it stores inside another one."""
    if not isinstance(data, Mapping):
        return data
    return {name: value for name, value in data.items() if name != "block_type_slug"}


def not_shown(error: ErrorDetails) -> InitErrorDetails:
    """An error of pydantic without the value that it complains of."""
    return InitErrorDetails(
        type=error["type"], loc=error["loc"], input="(not shown)", ctx=error.get("ctx", {})
    )


def validated(
    data: Any, handler: ModelWrapValidatorHandler[T], shown: Callable[[ErrorDetails], InitErrorDetails]
) -> T:
    """What pydantic's `handler` makes of `data`; its errors tell of the input only what `shown` leaves."""
    try:
        return handler(data)
    except ValidationError as error:
        raise ValidationError.from_exception_data(error.title, [shown(e) for e in error.errors()]) from None


def outputs_name(predict_id: str) -> str:
    """The outputs table of `predict_id`; raises `InvalidCall` for what could be no folder and no table."""
    check_name("predict_id", predict_id)
    return OUTPUTS + predict_id


def check_name(what: str, name: object) -> None:
    """Refuse a name that would lead elsewhere in a lake, or that a URL, Delta or a database would alter."""
    if (
        not isinstance(name, str)
        or not name
        or name != name.strip(" .")
        or not name.isprintable()
        or set(ODD) & set(name)
        or len(name.encode()) > LONGEST
    ):
        raise InvalidCall(
            f"{what}={name!r:.200} cannot name a table: it must be a printable text that is not empty, "
            f"neither begins nor ends with a space or a dot, has at most {LONGEST} bytes, and none of {ODD}"
        )


class Datalayer(Block):
    """Tables to read rows from and to write outputs to.

    A path or an fsspec URL (`data/`, `s3://bucket/folder`) is a lake: files that DuckDB reads, and
    outputs as Delta tables. A SQLAlchemy URL (`sqlite:///file.db`, `postgresql://user@host/name`) is a
    database. The credentials of object stores come from the environment (`AWS_ACCESS_KEY_ID`, ...).
    """

    _block_type_name = "vLLM Datalayer"
    _block_type_slug = "vllm-datalayer"
    _description = "Tables for vLLM predictions: a folder, an fsspec URL or a SQLAlchemy URL."

    _logo_url: ClassVar[Any] = LOGO
    _documentation_url: ClassVar[Any] = "https://docs.sqlalchemy.org/en/20/core/engines.html"
    _code_example = """
        ```python
        from vllm_tasks import Datalayer

        db = Datalayer.load("BLOCK_NAME")
        answers = db.outputs("my-model")
        ```
        """

    model_config = ConfigDict(extra="forbid")

    url: SecretStr = Field(
        title="URL",
        description="A folder or an fsspec URL (/data/tickets, s3://bucket/tickets), or a SQLAlchemy URL "
        "(postgresql://user:password@host/name). Kept secret, as it may hold a password.",
    )

    read: dict[str, dict[str, Any]] = Field(
        default={},
        title="Read options",
        description="Of a lake, by table: how its text files are read, as in "
        '{"tickets": {"delimiter": ";", "encoding": "latin-1"}}; also escape, quote, header, null_values.',
    )

    @model_validator(mode="before")
    @classmethod
    def _own_fields(cls, data: Any) -> Any:
        return own_fields(data)

    @model_validator(mode="wrap")
    @classmethod
    def _without_secrets(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """No error shows what was given: a URL with a password may be in any place."""
        return validated(data, handler, not_shown)

    @field_validator("url")
    @classmethod
    def _some_url(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().strip():
            raise ValueError("the url is empty; give a folder, an fsspec URL or a SQLAlchemy URL")
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
        """The committed outputs of `predict_id`, each key exactly once, as a `pyarrow.Table`.

        `table`: the outputs' own name, where the model's `model_update_kwargs` give one.
        `source`: a table, path or SELECT here whose rows, with their key `primary_id`, the outputs are of:
        each row in the source's order, its columns first, then those of its output, NULL where it has none.
        Columns: the key, the output's columns, `_position` when flattened, `_error`, `_finish_reason`,
        `_prompt_tokens`, `_completion_tokens`, `_seconds`, `_model`, `_uuid`, `_fingerprint`,
        `_input_hash`, `_created_at`. Raises `InvalidCall` when there are none, `TablesUnavailable`
        when the tables cannot be reached.
        """
        name = outputs_name(predict_id) if table is None else table
        check_name("table", name)
        tables = self.tables()
        try:
            found = tables.outputs(name)
            if source is None:
                return found
            from vllm_tasks.datalayer.beside import beside

            with closing(self.source(source)) as rows:
                key = (primary_id,) if isinstance(primary_id, str) else tuple(primary_id)
                return beside(rows, source, found, key)
        finally:
            tables.close()

    def tables(self) -> Lake | Database:
        """Open the lake or database; raises `InvalidCall` for a URL that is neither."""
        url = self._url
        if is_lake(url):
            check_place("the lake", url)
            from vllm_tasks.datalayer.lake.lake import Lake

            return Lake(url, self.read)
        if url.startswith(DUCKDB):
            raise InvalidCall(
                f"{url!r:.200} keeps no outputs: read from it with source=..., and let db=... be a lake, an "
                "SQLite file or PostgreSQL"
            )
        from vllm_tasks.datalayer.database.database import Database

        return Database(url)

    def source(self, select: str) -> Source:
        """What `select` names here, to be read only; whoever asks closes it.

        Any SQLAlchemy dialect that streams and files of DuckDB's are read beside what keeps outputs.
        Raises `InvalidCall`.
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
        """Where a person finds a table that is read here, without secrets."""
        url = without_secrets(self._url)
        return f"{url.rstrip('/')}/{table}" if is_lake(self._url) else f"table {table} in {url}"

    @property
    def _url(self) -> str:
        return self.url.get_secret_value().strip()


def is_lake(url: str) -> bool:
    """Whether `url` is a path, or its scheme one of fsspec's; all others are SQLAlchemy's."""
    import fsspec

    scheme, separator, _ = url.partition("://")
    return not separator or scheme in fsspec.available_protocols()
