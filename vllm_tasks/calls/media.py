"""Pictures, audio and video: fields of a record that become content parts of its message.

Their bytes are sent inside the request, as vLLM's server and its engine both take them. So an engine opens no
file and no address that a row names.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import fsspec

from vllm_tasks.calls.messages import with_user_content
from vllm_tasks.calls.picture_size import size_of
from vllm_tasks.calls.prompt_func import Signature, described, is_tuple
from vllm_tasks.calls.template import BadRow
from vllm_tasks.errors import InvalidCall
from vllm_tasks.hosts import options_of
from vllm_tasks.places import check_place, is_local, local_path, without_secrets
from vllm_tasks.rows import Message, Prompt, is_chat
from vllm_tasks.settings import site_settings

Kind = Literal["image", "audio", "video"]
Part = dict[str, Any]
"""A content part of a chat message."""

BEGINNINGS: Mapping[Kind, Mapping[str, bytes]] = {
    "image": {
        "png": rb"\x89PNG\r\n\x1a\n",
        "jpeg": rb"\xff\xd8\xff",
        "webp": rb"RIFF....WEBP",
        "gif": rb"GIF8[79]a",
    },
    "audio": {
        "wav": rb"RIFF....WAVE",
        "mp3": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",
        "flac": rb"fLaC",
        "ogg": rb"OggS",
    },
    "video": {"mp4": rb"....ftyp", "webm": rb"\x1a\x45\xdf\xa3", "x-msvideo": rb"RIFF....AVI "},
}
"""The formats that are sent, with the bytes that each begins with."""
DATA = re.compile(r"data:[^,]*?(;base64)?,", re.IGNORECASE)
"""The head of a `data:` URL. Its type does not count: the bytes say what they are."""


@dataclass(frozen=True)
class Media:
    """The fields of a record that are media. It is false if there are none."""

    fields: Mapping[str, Kind]
    most_bytes: int = field(default_factory=lambda: site_settings().max_media_bytes)
    """The largest size of all media of a row together, in bytes."""
    most: int = field(default_factory=lambda: site_settings().max_media_per_row)
    """The largest number of media of a row."""
    most_pixels: int = field(default_factory=lambda: site_settings().max_picture_pixels)
    """The largest number of pixels of a picture."""

    def __bool__(self) -> bool:
        return bool(self.fields)

    def added(self, prompt: Prompt, record: Mapping[str, Any]) -> list[Message]:
        """Return a prompt with the media of its record before the text of the last user message.

        Raises `BadRow` if one of them cannot be sent, or the prompt has no such message.
        """
        return _with_parts(prompt, self._parts(record))

    def _parts(self, record: Mapping[str, Any]) -> list[Part]:
        given = [(name, value) for name in self.fields for value in _listed(name, record)]
        if len(given) > self.most:
            raise BadRow(
                f"the row has {len(given):,} pictures, audio and video, and {self.most:,} are allowed "
                "(VLLM_TASKS_MAX_MEDIA_PER_ROW)"
            )
        left, parts = self.most_bytes, []
        for name, value in given:
            content = _content(name, value, left)
            if len(content) > left:
                raise BadRow(
                    f"the pictures, audio and video of the row have more than {self.most_bytes:,} bytes, "
                    "which are allowed (VLLM_TASKS_MAX_MEDIA_BYTES): send smaller ones"
                )
            left -= len(content)
            parts.append(_part(name, self.fields[name], content, self.most_pixels))
        return parts


NO_MEDIA = Media({}, 0, 0)


def media_fields(
    images: str | None, audio: str | None, video: str | None, signature: Signature
) -> dict[str, Kind]:
    """Return the fields of a record that are media. Raise ValueError for one that no record has."""
    named: list[tuple[str, Kind, str | None]] = [
        ("images", "image", images), ("audio", "audio", audio), ("video", "video", video),
    ]  # fmt: skip
    found: dict[str, Kind] = {}
    for argument, kind, name in named:
        if not name:
            continue
        if signature == "singleton" and name != "input":
            raise ValueError(
                f"{argument}={name!r} names a field, and with signature='singleton' a record is one value: "
                f"use signature='**kwargs' for dicts, or {argument}='input' if the value is what is sent"
            )
        if signature == "*args" and not name.isdecimal():
            raise ValueError(
                f"{argument}={name!r}: with signature='*args' fields are named by their positions, '0', "
                "'1', ...; use signature='**kwargs' for dicts"
            )
        if name in found:
            raise ValueError(f"{argument}={name!r} is {found[name]} already: name one field for each")
        found[name] = kind
    return found


def media_parts(prompt: Prompt) -> list[Part]:
    """Return the content parts of a prompt that are not texts."""
    if not is_chat(prompt):
        return []
    contents = [message.get("content") for message in prompt]
    return [
        part for content in contents if isinstance(content, list) for part in content if not _is_text(part)
    ]


def refuse_addresses(prompt: Prompt) -> None:
    """Raise `BadRow` if a message names a file or an address for the engine to open, and not its bytes.

    What the engine can reach is not what the site allows: it follows redirects, from a network of its own.
    """
    contents = [message.get("content") for message in prompt] if is_chat(prompt) else []
    parts = [part for content in contents if is_tuple(content) for part in content]
    for name, value in ((n, v) for part in parts if isinstance(part, Mapping) for n, v in part.items()):
        url = value.get("url") if isinstance(value, Mapping) else value
        if name.endswith("_url") and url and not (isinstance(url, str) and DATA.match(url)):
            shown = without_secrets(url) if isinstance(url, str) else url
            raise BadRow(
                f"the messages have {name}={shown!r:.200}, which the engine would open, and this site limits "
                "places (VLLM_TASKS_PLACES): put it into a field of the record that images, audio or video "
                "name, or give its bytes as a data: URL"
            )


def without_media(prompt: Prompt) -> Prompt:
    """Return a prompt for people, with the sizes of media in place of their bytes."""
    return [_shown(message) for message in prompt] if is_chat(prompt) else prompt


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    shown = {name: _shown(each) for name, each in value.items()}
    url, data = value.get("url"), value.get("data")
    if isinstance(url, str) and (head := DATA.match(url)) and head[1]:
        shown["url"] = f"{head[0]}{_size(url[head.end() :])}"
    if isinstance(data, str) and "format" in value:  # of an input_audio
        shown["data"] = _size(data)
    return shown


def _size(text: str) -> str:
    return f"... ({len(text) * 3 // 4 - text[-2:].count('='):,} bytes)"


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") == "text")


def _listed(name: str, record: Mapping[str, Any]) -> list[Any]:
    """Return the media of a field, which has one or a list."""
    if name not in record:
        raise BadRow(f"the record has no {name!r}; it has {sorted(map(str, record))[:10]}")
    value = record[name]
    return [*value] if is_tuple(value) else [value]


def _content(name: str, value: Any, most: int) -> bytes:
    """Return the bytes of a picture, audio or video; no more than are needed to see that `most` are exceeded.

    Raises `BadRow` if it cannot be read.
    """
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:  # as Hugging Face's datasets have it
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str | os.PathLike):
        raise BadRow(
            f"{name!r} is {described(value)}, not bytes, a path, a URI or a data: URL; an empty list sends "
            "the text alone"
        )
    uri = os.fspath(value)
    if head := DATA.match(uri):
        return _decoded(name, uri, head, most)
    try:
        check_place(name, uri)
        return _read(name, uri, most)
    except InvalidCall as error:
        raise BadRow(str(error)) from error


def _decoded(name: str, url: str, head: re.Match[str], most: int) -> bytes:
    if not head[1]:
        raise BadRow(f"{name!r} is a data: URL without base64: begin it with 'data:image/png;base64,'")
    if (len(url) - head.end()) * 3 // 4 - 2 > most:
        return bytes(most + 1)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"{name!r} is a data: URL whose base64 is wrong: {error}") from error


def _read(name: str, uri: str, most: int) -> bytes:
    if is_local(uri) and not os.path.isfile(local_path(uri)) and os.path.exists(local_path(uri)):
        # to open a pipe or a terminal could last forever
        raise BadRow(f"{name!r} {uri!r:.200} is not a file")
    try:
        with fsspec.open(uri, "rb", **options_of(name, uri)) as file:
            content: bytes = file.read(most + 1)
    except InvalidCall:
        raise
    except Exception as error:  # noqa: BLE001 - stores raise many types; it is this row's error
        # Danger: the original error may contain the complete URI with its secrets, so it is not chained.
        words = without_secrets(f"{name} {uri!r:.200} cannot be read: {type(error).__name__}: {error}")
        raise BadRow(words) from None
    return content


def _part(name: str, kind: Kind, content: bytes, most_pixels: int) -> Part:
    """Return media as the content part that vLLM takes. Raise `BadRow` for another format or a large size."""
    formats = BEGINNINGS[kind]
    found = next((f for f, begins in formats.items() if re.match(begins, content[:16], re.DOTALL)), None)
    if found is None:
        raise BadRow(
            f"{name!r} is not in a known {kind} format ({', '.join(formats)}): it begins with "
            f"{content[:12]!r}; convert it"
        )
    size = size_of(found, content) if kind == "image" else None
    if size is not None and size[0] * size[1] > most_pixels:
        raise BadRow(
            f"{name!r} has {size[0]:,} x {size[1]:,} pixels, and {most_pixels:,} are allowed in a picture "
            "(VLLM_TASKS_MAX_PICTURE_PIXELS): send a smaller one"
        )
    data = base64.b64encode(content).decode("ascii")
    if kind == "audio":  # OpenAI's form, which other servers know, too
        return {"type": "input_audio", "input_audio": {"data": data, "format": found}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/{found};base64,{data}"}}


def _with_parts(prompt: Prompt, parts: list[Part]) -> list[Message]:
    if not is_chat(prompt):
        raise BadRow("pictures, audio and video are parts of chat messages, and the prompt is token ids")

    def after_parts(content: Any) -> list[Any]:
        content = content or []
        return [*parts, *([{"type": "text", "text": content}] if isinstance(content, str) else content)]

    changed = with_user_content(
        prompt,
        after_parts,
        "pictures, audio and video go into the last user message, and the prompt has none",
    )
    return changed if parts else [*prompt]
