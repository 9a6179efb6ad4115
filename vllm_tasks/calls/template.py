"""Templates: the texts of prompts, with fields of the record, the context and artifacts."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_tasks.calls.plain_text import NoText, plain_text

ARTIFACT = "artifacts."


class BadRow(ValueError):
    """A record that cannot become a prompt."""


@dataclass(frozen=True)
class Template:
    """A prompt with fields that are literal keys: `{name}`, `{0}`, `{artifacts.name}`.

    It is parsed once and filled by joining, so data is never read as a template.
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Parse a prompt. Raise ValueError for a field that is more than a key."""
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"prompt {text!r}: {error}; write literal braces as {{{{ and }}}}") from error
        for _, name, spec, conversion in pieces:
            if name is None:
                continue
            key = name.removeprefix(ARTIFACT)
            if spec or conversion or not (key.isidentifier() or (name.isascii() and name.isdigit())):
                shown = f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
                raise ValueError(
                    f"prompt field {{{shown}}} is not a plain key: a field is a name, a number or "
                    "artifacts.<name>, without attributes, indexes, conversions or formats; "
                    "use prompt_func to compute values, and {{ }} for literal braces"
                )
        return cls(tuple((literal, field) for literal, field, _, _ in pieces))

    @property
    def fields(self) -> set[str]:
        """All fields: those of the record, of the call (`context`) and of the model (`artifacts.name`)."""
        return {field for _, field in self.parts if field is not None}

    @property
    def of_record(self) -> set[str]:
        """The fields that a record may fill: all except `artifacts.name`."""
        return {field for field in self.fields if not field.startswith(ARTIFACT)}

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt with these values. Raise `BadRow` if one is missing or has no text."""
        return "".join(
            literal + ("" if field is None else text_of(field, values)) for literal, field in self.parts
        )


def text_of(field: str, values: Mapping[str, Any]) -> str:
    """Return the text of a field. Raise `BadRow` if it is missing or has no text."""
    try:
        value = values[field]
    except KeyError:
        raise BadRow(f"the record has no {field!r}; it has {sorted(map(str, values))[:10]}") from None
    try:
        return plain_text(value)
    except NoText as error:
        raise BadRow(f"{field!r} {error}") from error
