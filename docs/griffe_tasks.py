"""Shows a task that is made by a call, `predict = RowsTask(_predict, ...)`, as its function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe


class Tasks(griffe.Extension):
    """Replaces the attribute by the function, under the public name.

    A function that is `signed_as` another one is shown with the arguments of that one.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in modules(pkg):
            for name, member in list(module.members.items()):
                function = module.members.get(f"_{name}")
                if not (isinstance(member, griffe.Attribute) and isinstance(function, griffe.Function)):
                    continue
                if isinstance(member.value, griffe.ExprCall):
                    function.name = name
                    function.parameters = signature_of(function).parameters
                    module.set_member(name, function)


def modules(package: griffe.Module) -> Iterator[griffe.Module]:
    yield package
    for member in package.members.values():
        if isinstance(member, griffe.Module):
            yield from modules(member)


def signature_of(function: griffe.Function) -> griffe.Function:
    """The function whose arguments are shown: this one, or the one that it is `signed_as`."""
    for decorator in function.decorators:
        call = decorator.value
        if isinstance(call, griffe.ExprCall) and call.function.canonical_name == "signed_as":
            contract = call.arguments[0]
            path = contract.canonical_path if isinstance(contract, griffe.Expr) else contract
            found = function.modules_collection[path]
            return found.final_target if isinstance(found, griffe.Alias) else found
    return function
