"""The tokens of a SQL statement."""

from __future__ import annotations


def tokens(statement: str) -> list[str]:
    """The statement's tokens without comments and a semicolon at the end; keywords are in upper case."""
    import duckdb

    text = statement.encode("utf-8", "surrogatepass")
    found = duckdb.tokenize(statement.encode("utf-8", "replace").decode())
    ends = [start for start, _ in found[1:]] + [len(text)]
    kept = []
    for (start, kind), end in zip(found, ends, strict=True):
        token = text[start:end].decode("utf-8", "replace").strip()
        if kind == duckdb.token_type.keyword:
            token = token.upper()
        if kind != duckdb.token_type.comment:
            kept.append(token)
    while kept and kept[-1] == ";":
        kept.pop()
    return kept
