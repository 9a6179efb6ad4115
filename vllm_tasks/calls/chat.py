"""Decides whether the texts of a call are sent as chat: as the call sets it, else as its model needs it.

A model needs chat if vLLM has a chat template for it. The model's files show that before an engine runs. A
server is asked, and a local engine too if the files are elsewhere or are not sufficient. Where a server does
not report it, as behind a gateway, texts are sent as chat until it refuses that for want of a template.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_tasks.calls.sampling import Target, of_one_kind
from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.http.transport import HttpConfig
from vllm_tasks.engines.stopping import raise_if_stopped

HUB_TIMEOUT = 5.0
"""Seconds that the hub may take to list a model's files; after that, only the hub's cache is used."""
FALLBACKS = {
    *("blip-2", "clip", "colpali", "deepseek_ocr", "deepseek_ocr2", "deepseek_vl_v2", "minicpmv"),
    *("minicpmv4_6", "minicpmv4_7", "paligemma", "siglip", "siglip2", "unlimited-ocr", "unlimited_ocr"),
}
"""Types of models for which vLLM provides a template: `vllm.transformers_utils.chat_templates`."""
WITHOUT_TEMPLATE = {
    *("MoonshotKimiaForCausalLM", "KimiK3ForConditionalGeneration", "DeepseekV32ForCausalLM"),
    *("DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration", "DeepseekV41ForCausalLM"),
    *("InklingForCausalLM", "InklingForConditionalGeneration"),
}
"""Architectures whose chat vLLM formats in code: `ModelConfig.__post_init__` of `vllm.config.model`."""


def of_call(chat: bool | None, target: Target, sampling: Mapping[str, Any]) -> bool | None:
    """Return whether the call sends texts as chat: by the path of its URL, else by `chat`, else by a
    parameter that only one kind of prompt takes. None: the model decides.

    Embeddings, scores and classes are of plain text unless `chat` is set, as with vLLM's `LLM.embed`: many of
    their models have the chat template of the model that they were made from.
    """
    if target in ("legacy", "completions", "embed", "score", "classify"):
        return bool(chat)
    if target == "reward":
        return chat
    if target == "chat":
        return True
    return of_one_kind(sampling) if chat is None else chat


def of_model(config: sharing.Config) -> bool | None:
    """Return whether an engine's model has a chat template; None if its server does not report it.

    If it needs a request, it raises its errors.
    """
    found = None if isinstance(config, HttpConfig) else of_files(json.loads(config.engine_args))
    return loop.run(sharing.has_chat_template(config), raise_if_stopped) if found is None else found


def of_files(arguments: Mapping[str, Any]) -> bool | None:
    """Return whether the model of these engine arguments has a chat template; None: its files do not show it.

    The files are in a folder, or in a repository of Hugging Face, from which a few small ones are downloaded
    if the hub's cache does not have them. They are read as transformers and vLLM read them. A file that
    cannot be fetched now is not taken for absent: vLLM may fetch it a moment later.
    """
    named = {name.replace("-", "_"): value for name, value in arguments.items()}
    if named.get("chat_template"):
        return True
    if named.get("tokenizer_mode", "auto") not in ("auto", "hf"):
        return None
    revision, cache, token = named.get("revision"), named.get("download_dir"), named.get("hf_token")
    model = Files(named["model"], revision, cache, token)
    tokenizer = Files(
        named.get("tokenizer") or model.name, named.get("tokenizer_revision") or revision, cache, token
    )
    try:
        found = _of_tokenizer(tokenizer)
        return _of_type(model) if found is False else found
    except NotFetched:
        return None


def _of_tokenizer(files: Files) -> bool | None:
    config = files.read("tokenizer_config.json")
    if config is None:
        return None
    apart = {path.stem for path in files.beside("additional_chat_templates/*.jinja")}
    written = config.get("chat_template")
    if written and isinstance(written, str) and not apart:  # whether or not a file of its own replaces it
        return True
    if files.path("chat_template.jinja"):
        apart.add("default")
    if isinstance(written, list):
        apart = apart or {str(each.get("name")) for each in written}
    if apart:
        return True if "default" in apart else None
    if written or files.path("chat_template.json"):
        return True
    # A tokenizer with its own code, and Mistral's tokenizer, may need no template.
    has_own = "auto_map" in config or files.path("tekken.json") or any(files.beside("consolidated*"))
    return None if has_own else False


def _of_type(files: Files) -> bool | None:
    """Return whether vLLM has a template for a model whose tokenizer has none."""
    config = files.read("config.json")
    if config is None or WITHOUT_TEMPLATE & set(config.get("architectures") or ()):
        return None
    return config.get("model_type") in FALLBACKS


@dataclass(frozen=True)
class Files:
    """The files of a model, in a folder or in a repository of Hugging Face."""

    name: str
    revision: str | None
    cache: str | None
    token: Any

    def path(self, file: str) -> Path | None:
        """Return the path of a file, or None if it does not exist."""
        if os.path.isdir(self.name):
            path = Path(self.name, file)
            return path if path.is_file() else None
        return _in_hub(self.name, file, self.revision, self.cache, self.token)

    def read(self, file: str) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None if it has none."""
        path = self.path(file)
        return None if path is None else _object(path, path.stat().st_mtime_ns)

    def beside(self, pattern: str) -> list[Path]:
        """Return the files that match `pattern` in the folder of the tokenizer's configuration."""
        path = self.path("tokenizer_config.json")
        return [] if path is None else list(path.parent.glob(pattern))


class NotFetched(Exception):
    """It is not known whether a repository has a file: the hub did not report it, or did not send it."""


def _in_hub(name: str, file: str, revision: str | None, cache: str | None, token: Any) -> Path | None:
    """Return a repository's file, from the hub's cache or downloaded into it; None if there is none, or this
    machine has no client of the hub. Raise `NotFetched` if the hub cannot be reached."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:  # as on a machine without vLLM
        return None
    try:
        found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        if found is None:
            if (listed := _listing(name, revision, token)) is None:
                raise NotFetched
            if file in listed:
                found = hf_hub_download(name, file, cache_dir=cache, revision=revision, token=token)
    except Exception as error:  # the client raises many types without a network or repository
        raise NotFetched from error
    return Path(found) if isinstance(found, str) else None


@functools.lru_cache(maxsize=64)
def _listing(name: str, revision: str | None, token: Any) -> frozenset[str] | None:
    """Return the files that the hub lists: none in its offline mode, in which vLLM has only the cache, too.

    It is None if the hub cannot be reached, and stays so, as each attempt may take the time limit.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        listed = model_info(name, revision=revision, token=token, timeout=HUB_TIMEOUT).siblings or ()
    except OfflineModeIsEnabled:
        return frozenset()
    except Exception:  # noqa: BLE001 - the hub's client raises many types without a network or repository
        return None
    return frozenset(file.rfilename for file in listed)


@functools.lru_cache(maxsize=64)
def _object(path: Path, _changed: int) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
