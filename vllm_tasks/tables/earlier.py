"""Checks of earlier outputs: their source, the fingerprint they were made under, the length of vectors."""

from __future__ import annotations

from vllm_tasks.datalayer.selection import Row, Selection, Tables
from vllm_tasks.errors import InvalidCall


def refuse_other_source(tables: Tables, outputs: str, source: str) -> None:
    """Raise `InvalidCall` if the outputs were made from another source than `source`."""
    first = _first(tables, "*", outputs)
    if first is None or first.get("_source", source) == source or _has_source(tables, outputs, source):
        return
    other = _first(tables, "_source", outputs, "_source IS NOT NULL")
    if other is not None:
        raise InvalidCall(
            f"the outputs {outputs!r} are of {other['_source']!r}, not of {source!r}: their answers would "
            "be taken for those of other rows with the same keys. Give predict_id='...' for separate outputs "
            "or same_source=True if the rows are the same (a renamed table, an edited SELECT)"
        )


def _has_source(tables: Tables, outputs: str, source: str) -> bool:
    from vllm_tasks.datalayer.workspace import literal

    return _first(tables, "_source", outputs, f"_source = {literal(source)}") is not None


def holds_others(tables: Tables, selection: Selection) -> bool:
    """Whether there is an output (not an error) that was made under another fingerprint."""
    from vllm_tasks.datalayer.workspace import literal

    other = f"_error IS NULL AND _fingerprint <> {literal(selection.fingerprint)}"
    return _first(tables, "_fingerprint", selection.outputs, other) is not None


def length_of_vectors(tables: Tables, selection: Selection, column: str) -> int | None:
    """The length of the vectors that earlier calls committed under the same fingerprint, None if there are
    none: a server may have another model under the same name."""
    from vllm_tasks.datalayer.lake.delta import quoted
    from vllm_tasks.datalayer.vectors import of_bytes
    from vllm_tasks.datalayer.workspace import literal

    same = f"_fingerprint = {literal(selection.fingerprint)} AND _error IS NULL"
    first = _first(tables, quoted(column), selection.outputs, same)
    vector = first and first[column]
    return None if vector is None else len(of_bytes(vector) if isinstance(vector, bytes) else vector)


def _first(tables: Tables, columns: str, outputs: str, where: str = "1 = 1") -> Row | None:
    return next(iter(tables.stored(outputs, columns, f"{where} LIMIT 1")), None)
