"""For the reference: a task made by a call, `predict = RowsTask(_predict, ...)`, is shown as its function."""

from __future__ import annotations

from typing import Any

import griffe


class Tasks(griffe.Extension):
    """Puts the function in the place of the attribute, under the public name."""

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        for name, member in list(mod.members.items()):
            function = mod.members.get(f"_{name}")
            if not (isinstance(member, griffe.Attribute) and isinstance(function, griffe.Function)):
                continue
            if isinstance(member.value, griffe.ExprCall):
                function.name = name
                mod.set_member(name, function)
