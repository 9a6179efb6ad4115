"""Prompt files: Jinja templates whose variables are the fields of a record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vllm_tasks.calls.plain_text import plain_text
from vllm_tasks.calls.template import BadRow
from vllm_tasks.errors import InvalidCall

RANDOM = {"filters": ("random",), "globals": ("lipsum",)}
"""Names of Jinja's that would make another prompt of the same row each time."""


def _environment() -> ImmutableSandboxedEnvironment:
    """An environment for templates that reach nothing but their values, and change none of these."""
    # Prompts are plain text, so nothing is escaped. Values have the same text as in a `{field}`.
    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_text, autoescape=False)
    for kind, names in RANDOM.items():
        for name in names:
            del getattr(made, kind)[name]
    return made


def _text(value: object) -> str:
    if isinstance(value, Undefined):
        return str(value)  # raises Jinja's error with the name
    return plain_text(value)


@dataclass(frozen=True)
class PromptFile:
    """A prompt file, parsed. Like a `Template` it has `fields` and can be filled."""

    fields: frozenset[str]
    """The variables that the file uses: those of the record, `context` and `artifacts`."""
    template: Any

    @classmethod
    def parse(cls, text: str, artifacts: Collection[str]) -> PromptFile:
        """Parse a file. Raise `InvalidCall` if it is no template, or needs what it does not get."""
        environment = _environment()
        try:
            tree = environment.parse(text)
            template = environment.from_string(text)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise InvalidCall(f"the prompt file is no Jinja template: {error} (line {line})") from error
        if any(True for _ in meta.find_referenced_templates(tree)):
            raise InvalidCall(
                "the prompt file includes, imports or extends another file, and no other is read: write its "
                "text here, or give it as one of the artifacts"
            )
        named = [n for n in tree.find_all(nodes.Getattr) if isinstance(n.node, nodes.Name)]
        used = {n.attr for n in named if n.node.name == "artifacts"}  # type: ignore[attr-defined]  # a Name
        if absent := sorted(used - {*artifacts}):
            raise InvalidCall(
                f"the prompt file uses artifacts {absent}, but artifacts has {sorted(artifacts)}"
            )
        variables = meta.find_undeclared_variables(tree) - environment.globals.keys()
        return cls(frozenset(variables), template)

    @property
    def of_record(self) -> frozenset[str]:
        """The fields that a record may fill."""
        return self.fields - {"artifacts"}

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt with these values. Raise `BadRow` if one is missing or has no text."""
        try:
            filled: str = self.template.render(values)
        except Exception as error:  # any error of a template is its row's error
            raise BadRow(f"the prompt file raised {type(error).__name__}: {error}") from error
        return filled
