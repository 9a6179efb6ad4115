"""Which rows belong to a shard, in DuckDB's SQL."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_tasks.datalayer.selection import Shard


def in_shard(shard: Shard, key: Iterable[str]) -> str:
    """A condition on the columns `key`, which have the types in which outputs keep them.

    It is by MD5: shards run on many machines, and MD5 is the same in every DuckDB.
    """
    index, count = shard
    texts = ", ".join(f"CAST({column} AS VARCHAR)" for column in key)
    return f"md5_number_lower(concat_ws(chr(31), {texts})) % {count:d} = {index:d}"
