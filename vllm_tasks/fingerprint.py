"""What decides an answer, as one hash; and the hash of one row's input.

In the fingerprint: the model (and its revision, the files of a local folder, the engine arguments that
change what it computes), prompt, source of `prompt_func`, contents of artifacts, signature, chat, system,
context, sampling, output schema and datatype, and which columns are which argument. Not in it: where the
server is, batch size, window, retries, hardware. What a server does not tell, its weights, cannot be in it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_tasks.callables import dotted_path

WHOLE = 16 * 2**20
"""Bytes: a file of a model up to this size is hashed whole, a larger one by its size and by samples."""
SAMPLES, SAMPLE = 16, 2**20
"""How many samples of a large file are read, spread evenly, and how many bytes each has."""
PERFORMANCE_ONLY = {
    "async_scheduling",
    "block_size",
    "compilation_config",
    "cpu_offload_gb",
    "data_parallel_size",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "load_format",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}
"""Engine arguments of vLLM that change how fast it answers, not what. All others count."""
IDENTITY_OF_A_FOLDER = "model", "tokenizer", "hf_config_path"


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 in hexadecimal digits of `parts` as canonical JSON; the same on every machine."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def input_hash(values: Sequence[Any]) -> str:
    """128 bits in hexadecimal digits of what one row's prompt is made of."""
    return hashlib.blake2b(canonical(values).encode(), digest_size=16).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys; what JSON has no type for is written with its type."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_typed)


def _typed(value: object) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(canonical, value))
    if isinstance(value, Sequence):
        return list(value)
    return {type(value).__name__: str(value)}


def source_of(function: Callable[..., Any] | None) -> Any:
    """The path of a function and its source text. What it calls is not in it.

    A callable without a source (a built-in, an object) is known by its path and, for a callable
    object, by the source of its class.
    """
    if function is None:
        return None
    if isinstance(function, functools.partial):
        return [source_of(function.func), function.args, function.keywords]
    code = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        return [dotted_path(function), inspect.getsource(code)]
    except (OSError, TypeError):
        return [dotted_path(function)]


def engine_identity(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of vLLM's engine arguments decides an answer; a folder counts by its files."""
    identity = {name: value for name, value in arguments.items() if name not in PERFORMANCE_ONLY}
    for name in IDENTITY_OF_A_FOLDER:
        folder = identity.get(name)
        if isinstance(folder, str) and Path(folder).is_dir():
            identity[name] = _hashes(folder)
    return identity


def _hashes(folder: str) -> dict[str, str]:
    """A hash for each file of a model's folder by its name; where the folder is does not count."""
    files = sorted(f for f in Path(folder).iterdir() if f.is_file() and not f.name.startswith("."))
    return {f.name: _hash_of(f, f.stat().st_mtime_ns, f.stat().st_size) for f in files}


@functools.lru_cache(maxsize=1024)
def _hash_of(file: Path, _modified: int, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        if size <= WHOLE:
            digest.update(content.read())
        else:
            for i in range(SAMPLES):
                content.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()
