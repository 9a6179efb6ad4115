"""What decides an answer, as one hash; and the hash of one row's input.

In the fingerprint: the model (and its revision, the files of a local folder, the engine arguments that
change what it computes), prompt, source of `prompt_func`, contents of artifacts, signature, chat, system,
context, sampling, output schema and datatype, and which columns are which argument. Not in it: where the
server is, batch size, window, retries, hardware. What a server does not tell, its weights, cannot be in it.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath
from types import CodeType
from typing import Any
from uuid import UUID

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
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}
"""Engine arguments of vLLM that change how fast it answers, not what. All others count."""
NOT_OF_AN_ANSWER = PERFORMANCE_ONLY | {"hf_token"}
DEEPEST = 100
"""Levels of nested values that are told apart."""
PLAIN_TEXTS = date, time, timedelta, Decimal, UUID, Fraction, complex, PurePath
"""Types whose text says all of a value."""
IDENTITY_OF_A_FOLDER = "model", "tokenizer", "hf_config_path"


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 in hexadecimal digits of `parts` as canonical JSON; the same on every machine."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def input_hash(values: Sequence[Any]) -> str:
    """128 bits in hexadecimal digits of what one row's prompt is made of."""
    return hashlib.blake2b(canonical(values).encode(), digest_size=16).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys; what JSON has no type for is written with its type.

    A float that is a whole number is written as one: a form in a browser makes 0 of 0.0.
    """
    return json.dumps(_plain(value, 0), sort_keys=True, separators=(",", ":"))


def _plain(value: Any, depth: int) -> Any:
    """`value` as JSON's types; an object by its class and state, never by its address."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    if depth > DEEPEST:
        return {"deeper": type(value).__qualname__}
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else canonical(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(canonical, value))
    if isinstance(value, Sequence):
        return [_plain(item, depth + 1) for item in value]
    if callable(value):
        return _plain(source_of(value), depth + 1)
    if isinstance(value, PLAIN_TEXTS):
        return {type(value).__name__: str(value)}
    return {type(value).__qualname__: _plain(_state_of(value), depth + 1)}


def _state_of(value: object) -> Any:
    """What an object holds: its attributes, or where it has none what it would be copied by."""
    if (attributes := getattr(value, "__dict__", None)) is not None:
        return attributes
    reducer = copyreg.dispatch_table.get(type(value))
    try:
        copied = reducer(value) if reducer else value.__reduce_ex__(2)
    except Exception:  # noqa: BLE001 - whatever its class raises: it is known by its class alone
        return None
    return copied if isinstance(copied, str) else [_listed(part) for part in copied[1:]]


def _listed(part: Any) -> Any:
    return list(part) if isinstance(part, Iterator) else part


def source_of(function: Callable[..., Any] | None) -> Any:
    """The source text of a function, with its defaults and the values that it closes over; not what it calls.

    A callable object is known by the source of its class and its state, a function whose source is
    not there by its bytecode, a built-in one by its path.
    """
    if function is None:
        return None
    if isinstance(function, functools.partial):
        return [source_of(function.func), function.args, function.keywords]
    if inspect.ismethod(function):
        return [source_of(function.__func__), source_of_object(function.__self__)]
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        return source_of_object(function)
    code = getattr(function, "__code__", None)
    defaults = getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)
    held = [_cells_of(function), *defaults]
    try:
        return [inspect.getsource(function), held]
    except (OSError, TypeError):
        return [dotted_path(function) if code is None else _bytecode_of(code), held]


def _bytecode_of(code: CodeType) -> list[Any]:
    """What a function does, and those inside it."""
    constants = [_bytecode_of(each) if inspect.iscode(each) else each for each in code.co_consts]
    return [code.co_code, constants, code.co_names]


def _cells_of(function: Any) -> dict[str, Any]:
    """The values that a function closes over, by their names; one that is not bound yet is left out."""
    held: dict[str, Any] = {}
    if (code := getattr(function, "__code__", None)) is not None:
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):
                held[name] = cell.cell_contents
    return held


def source_of_object(value: object) -> Any:
    """The source of the class of `value`, and its state."""
    try:
        made_by = inspect.getsource(type(value))
    except (OSError, TypeError):
        made_by = type(value).__qualname__
    return [made_by, _state_of(value)]


def engine_identity(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of vLLM's engine arguments decides an answer; a folder counts by its files."""
    identity = {name: value for name, value in arguments.items() if name not in NOT_OF_AN_ANSWER}
    for name in IDENTITY_OF_A_FOLDER:
        folder = identity.get(name)
        if isinstance(folder, str) and Path(folder).is_dir():
            identity[name] = _hashes(folder)
    return identity


def sampling_identity(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What of a call's parameters decides an answer: all; a LoRA adapter's folder counts by its files."""
    lora = sampling.get("lora_request")
    if isinstance(lora, Mapping) and Path(str(lora.get("lora_path"))).is_dir():
        lora = {**lora, "lora_path": _hashes(str(lora["lora_path"]))}
    return {**sampling, "lora_request": lora} if lora else dict(sampling)


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
