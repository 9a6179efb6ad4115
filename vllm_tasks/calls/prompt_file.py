"""Prompt files: Jinja templates whose variables are the fields of a record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, meta, nodes

from vllm_tasks.calls.sandbox import Sandbox
from vllm_tasks.calls.template import BadRow
from vllm_tasks.errors import InvalidCall


@dataclass(frozen=True)
class PromptFile:
    """A prompt file, parsed. Like a `Template` it has `fields` and can be filled."""

    fields: frozenset[str]
    """The variables that the file uses: those of the record, `context` and `artifacts`."""
    template: Any
    sandbox: Sandbox

    @classmethod
    def parse(cls, text: str, artifacts: Collection[str], most: int) -> PromptFile:
        """Parse a file whose prompts have at most `most` characters.

        Raise `InvalidCall` if it is not a template, or needs another file or an unknown artifact.
        """
        environment = Sandbox(most)
        try:
            tree = environment.parse(text)
            template = environment.from_string(tree)
        except RecursionError as error:
            raise InvalidCall("the prompt file nests its blocks or brackets too deeply") from error
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise InvalidCall(f"the prompt file is not a Jinja template: {error} (line {line})") from error
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
        return cls(frozenset(variables), template, environment)

    @property
    def of_record(self) -> frozenset[str]:
        """The fields that a record may fill."""
        return self.fields - {"artifacts"}

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt with these values. Raise `BadRow` if one is missing or has no text."""
        try:
            with self.sandbox.one_row():
                filled: str = self.template.render(values)
        except BadRow:
            raise
        except Exception as error:  # any error of a template is its row's error
            raise BadRow(f"the prompt file raised {type(error).__name__}: {error}") from error
        return filled
