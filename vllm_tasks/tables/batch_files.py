"""OpenAI batch files: the rows of a table as requests, and outputs as results."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal, get_args
from uuid import uuid4

import fsspec
from pydantic import SecretStr

from vllm_tasks.calls.batch_request import line_of
from vllm_tasks.calls.call import Model, check_model
from vllm_tasks.calls.columns import Columns
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import named_columns
from vllm_tasks.datalayer.opening import Store, open_tables, source_of
from vllm_tasks.datalayer.selection import POSITION, Key, Selection
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.places import check_place, without_secrets
from vllm_tasks.printable import printable
from vllm_tasks.rows import RowError
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.tables.keys import display_key
from vllm_tasks.tables.source_rows import requests_of, rows_at_once

if TYPE_CHECKING:
    from pyarrow import Table

logger = logging.getLogger(__name__)

Url = Literal["/v1/chat/completions", "/v1/completions"]


def export_batch(
    model: Model,
    X: Columns,  # noqa: N803 - the name in predict_in_db
    select: Any,
    path: str | os.PathLike[str],
    *,
    primary_id: str | Sequence[str] = "id",
    db: Datalayer | str | None = None,
    source: Store | None = None,
    model_name: str | None = None,
    context: Context = None,
    sampling_columns: Mapping[str, str] | None = None,
    **sampling: Any,
) -> int:
    """Write the rows of a table as an OpenAI batch file: the requests that `predict_in_db` would send.

    vLLM's `run-batch` and OpenAI's Batch API read such a file. Nothing is sent, and outputs of earlier calls
    have no effect. Rows without a prompt, and lines that cannot be read, are left out, with a warning that
    names the first.

    Args:
        model: The model that would answer.
        X: The columns of a record, as in `predict_in_db`.
        select: The table or SELECT, as in `predict_in_db`.
        path: The file, at any fsspec URI. It is replaced once the new one is complete.
        primary_id: The column that identifies a row, which becomes `custom_id` as a text; several columns
            become a JSON list.
        db: Where the rows are, unless `source` is given; the model's own when None.
        source: Where the rows are read, if not in `db`.
        model_name: The name of the model where the file is processed; None: its name here.
        context: Fills `{context}` in every prompt.
        sampling_columns: Columns with sampling parameters of the row's own, as in `predict_in_db`.
        **sampling: Sampling parameters of this call.

    Returns:
        The number of requests in the file.

    Raises:
        InvalidCall: The call could not succeed, or the file may not be written there.
        TablesUnavailable: The tables or the file cannot be reached.
    """
    check_model(model)
    call = model.prepare(export_batch, context, sampling)
    key = named_columns("primary_id", primary_id)
    tables, named = open_tables(datalayer_of(db, model), select, source_of(source))
    with closing(tables):
        over = call.over(X, sampling_columns)
        selection = Selection(named, key, over.columns, f"_batch_{uuid4().hex}", over.fingerprint, "all")
        tables.check(selection)
        name, count, failed = model_name or over.model_name, 0, list[tuple[Key, RowError]]()
        with _written(path) as file:
            for rows in tables.rows(selection, rows_at_once(over)):
                for row, request in zip(rows, requests_of(over, rows), strict=True):
                    if isinstance(request, RowError):
                        failed.append((row.key, request))
                    else:
                        file.write(line_of(_custom_id(row.key), request, name))
                        count += 1
        unreadable = tables.unreadable()
    if failed:
        key_of_first, error = failed[0]
        logger.warning(
            "%d rows are not in the batch file, the first is %s: %s: %s",
            len(failed), display_key(key_of_first), error.kind, error.reason,
        )  # fmt: skip
    if unreadable.count:
        logger.warning(
            "%d lines could not be read and are not in the batch file, the first is %s",
            unreadable.count, printable(unreadable.examples[0]),
        )  # fmt: skip
    return count


def export_batch_results(
    predict_id: str,
    path: str | os.PathLike[str],
    *,
    db: Datalayer | str,
    primary_id: str | Sequence[str] = "custom_id",
    url: Url = "/v1/chat/completions",
) -> int:
    """Write committed outputs in the format of the results of OpenAI's Batch API.

    Each line has `custom_id`, `response` with the answer, and `error` with the reason if the row has none.
    Several columns of an answer become one JSON object, in which JSON from SQLite is text. Columns that
    people have added are left out.

    Args:
        predict_id: The name that the call gave its outputs.
        path: The file, at any fsspec URI. It is replaced once the new one is complete.
        db: Where the outputs are: a `Datalayer` or its URL.
        primary_id: The column that identifies a row; several become a JSON list, as in `export_batch`.
        url: The endpoint whose responses the answers become.

    Returns:
        The number of lines.

    Raises:
        InvalidCall: There are no such outputs, they are flattened or have another key, `url` is none of the
            two, or the file may not be written there.
        TablesUnavailable: The tables or the file cannot be reached.
    """
    if not isinstance(db, Datalayer | str | os.PathLike):
        raise InvalidCall(f"db=<{type(db).__name__}> is neither a Datalayer nor its URL")
    if url not in get_args(Url):
        raise InvalidCall(f"url={url!r:.200} is none of {', '.join(map(repr, get_args(Url)))}")
    datalayer = db if isinstance(db, Datalayer) else Datalayer(url=SecretStr(os.fspath(db)))
    key = named_columns("primary_id", primary_id)
    found = datalayer.outputs(predict_id)
    if POSITION in found.column_names:
        raise InvalidCall(
            f"{outputs_name(predict_id)!r} has several rows for one request (flatten=True), and a result has "
            "one: run it without flatten, under another predict_id"
        )
    columns = _answer_columns(found, key, outputs_name(predict_id))
    nested = {name for name in columns if (found.field(name).metadata or {}).get(b"json")}
    with _written(path) as file:
        for batch in found.to_batches():
            for row in batch.to_pylist():
                custom_id = _custom_id(tuple(row[name] for name in key))
                answer = {name: row[name] for name in columns}
                result = _result(custom_id, row, _text(answer, nested), url)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
    return int(found.num_rows)


def _answer_columns(outputs: Table, key: Sequence[str], name: str) -> list[str]:
    """The columns of the answer. An outputs table begins with its key, and others' columns are at its end.

    Raises `InvalidCall` if `key` is not its key: another column, or a part of it, would not name one request.
    """
    begins = outputs.column_names[: outputs.column_names.index("_error")]
    keys = outputs.select(begins[: len(key)])
    if {*keys.column_names} != {*key} or keys.group_by(key).aggregate([]).num_rows < keys.num_rows:
        hint = near(key[0], begins) if key[0] not in begins else ""
        raise InvalidCall(
            f"primary_id={list(key)!r:.200} is not the key of {name!r}, whose columns are "
            f"{begins!r:.300}{hint}; give the primary_id of the call that made the outputs"
        )
    return [column for column in begins[len(key) :] if not column.startswith("_")]


def _custom_id(key: Key) -> str:
    return str(key[0]) if len(key) == 1 else json.dumps([*key], default=str, ensure_ascii=False)


def _result(custom_id: str, row: Mapping[str, Any], text: str, url: Url) -> dict[str, Any]:
    """The result of one row, as OpenAI's Batch API writes it."""
    request_id = f"vllm-tasks-{custom_id}"
    if row["_error"] is not None:
        code, _, message = row["_error"].partition(": ")
        return {
            "id": request_id,
            "custom_id": custom_id,
            "response": None,
            "error": {"code": code, "message": message},
        }
    is_chat = url == "/v1/chat/completions"
    answer = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    prompt, completion = row["_prompt_tokens"] or 0, row["_completion_tokens"] or 0
    body = {
        "id": request_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(row["_created_at"].timestamp()),
        "model": row["_model"],
        "choices": [{"index": 0, **answer, "logprobs": None, "finish_reason": row["_finish_reason"]}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return {"id": request_id, "custom_id": custom_id, "response": response, "error": None}


def _text(answer: Mapping[str, Any], nested: Set[str]) -> str:
    """An answer as the text of a completion. Several columns are a JSON object; `nested` are JSON already."""
    if [*answer] == ["output"]:
        value = answer["output"]
        return (
            value if isinstance(value, str) else _plain(value) if isinstance(value, bytes) else _json(value)
        )
    pairs = (
        f"{_json(name)}: {value if name in nested and value is not None else _json(value)}"
        for name, value in answer.items()
    )
    return f"{{{', '.join(pairs)}}}"


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> str:
    """A value that JSON has no type for, as a text."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


@contextmanager
def _written(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """A text file that is there only if it is complete."""
    from vllm_tasks.datalayer.storage_errors import storage_errors  # which imports DuckDB and delta-rs

    if (
        not isinstance(path, str | os.PathLike)
        or not (uri := os.fspath(path))
        or "\0" in uri
        or uri.endswith("/")
        or os.path.isdir(uri)
    ):
        raise InvalidCall(f"path={path!r:.200} is not the path of a file: give one, such as 'requests.jsonl'")
    check_place("the batch file", uri)
    with storage_errors(f"cannot write {without_secrets(uri)!r}"):
        # A filesystem of its own, because a transaction is of all files that are opened with it.
        try:
            filesystem, at = fsspec.core.url_to_fs(uri, skip_instance_cache=True)
        except ValueError as error:
            raise InvalidCall(
                f"path={without_secrets(uri)!r:.200}: {error}; give a path or an fsspec URI"
            ) from error
        with filesystem.transaction, filesystem.open(at, "w", encoding="utf-8", newline="\n") as file:
            yield file
