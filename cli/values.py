"""Flags as Typer has them. Typer converts each value by pydantic, whose import takes a quarter of the
time of a small command; what is already of a flag's type is left as it is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import typer


@dataclass
class AsItIs:
    """In the place of what Typer makes of a parameter, which it makes when it is needed."""

    make: Callable[[], Any]
    """Typer's own."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        wanted = param.type_descriptor.annotation
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        if type(value) is wanted:
            return value
        if get_origin(wanted) is list and isinstance(value, (list, tuple)):
            (of,) = get_args(wanted)
            if all(type(one) is of for one in value):
                return list(value)
        number = next((one for one in (int, float) if wanted is one or one in get_args(wanted)), None)
        if number is not None and isinstance(value, str):
            try:
                return number(value)
            except ValueError:
                expected = "a whole number" if number is int else "a number"
                raise typer.BadParameter(f"{value}: expected {expected}", ctx, param) from None
        return self.make().coerce(value, param=param, ctx=ctx)


def quicken(parameter: Any) -> None:
    """Have a parameter of Typer convert only what it must."""
    own = parameter.type_descriptor.parameter_info
    if getattr(own, "parser", None) is None and "get_runtime_param" not in vars(parameter):
        as_it_is = AsItIs(parameter.get_runtime_param)
        parameter.get_runtime_param = lambda: as_it_is


def options_of(function: Callable[..., None]) -> list[Any]:
    """The options of a function, as a command of Typer has them, for other commands to take as well."""
    program = typer.Typer(add_completion=False)
    program.command()(function)
    return typer.main.get_command(program).params
