"""Flags that several commands share, commands whose flags come from a dataclass, and printing of talk and data."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.show import show
from controlnet.model.work.jobs import Job
from controlnet.model.work.options import Option
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.log import LOG
from rich.markup import escape
from typer.core import TyperCommand


def say(text: str) -> None:
    """Talk goes to standard error; standard output is data."""
    LOG.debug("%s", text)
    print(text, file=sys.stderr)


def warn(text: str) -> None:
    say(f"warning: {text}")


def say_error(what: str, error: ControlNetError, told: set[str]) -> None:
    """One of many that failed, `what` it was, and what can be done: a hint that was `told` is not told again."""
    say(f"error: {what}{error}")
    if error.hint and error.hint not in told:
        told.add(error.hint)
        say(f"hint: {error.hint}")


def tell(fields: dict[str, Any], as_json: bool) -> None:
    """One line of data on standard output: the path, or the whole object."""
    LOG.debug("written: %s", fields["output"])
    print(dumps(fields) if as_json else fields["output"], flush=True)
    show(fields["output"])


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    """The classes of a file, by name."""
    return {node.name: node for node in ast.parse(Path(file).read_bytes()).body if isinstance(node, ast.ClassDef)}


@cache
def field_docs(options: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass, and of those that it extends, each in one line."""
    docs: dict[str, str] = {}
    for owner in reversed(options.__mro__[:-1]):
        body = _classes(inspect.getfile(owner))[owner.__name__].body
        for line, after in zip(body, body[1:], strict=False):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and documented:
                text = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
                docs[line.target.id] = escape(text)  # square brackets are not the console's markup
    return docs


def flags_of_job(*names: str) -> list[inspect.Parameter]:
    """A flag for each field of `Job`, or only for those in `names`."""
    return [
        _flag_of(field.name, field.default, field.metadata["option"])
        for field in fields(Job)
        if not names or field.name in names
    ]


def _flag_of(name: str, default: Any, option: Option) -> inspect.Parameter:
    flag = typer.Option(
        f"--{name.replace('_', '-')}", *option.flags, metavar=option.metavar, help=field_docs(Job)[name]
    )
    default = default if option.flag_default is ... else option.flag_default
    type_ = option.type | None if default is None else option.type
    return parameter(name, Annotated[type_, flag], default)


def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def typed(function: Callable, parameters: list[inspect.Parameter]) -> Callable:
    """The function with these parameters in place of its **keywords, so that Typer can make a command of it."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def command_named(function: Callable, name: str, help_: str, parameters: list[inspect.Parameter]) -> TyperCommand:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"]}
    single.command(name, help=help_, context_settings=settings)(typed(function, parameters))
    return typer.main.get_command(single)  # type: ignore[return-value]


Out = Annotated[str | None, typer.Option("-o", "--out", help=field_docs(Job)["out"])]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per result instead of its path.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave existing results as they are and go on.")]
Recursive = Annotated[bool, typer.Option("-r", "--recursive", help="Search folders inside folders too.")]
ShardFlag = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Only part I of N, the same each time. auto: as SLURM or a launcher says.",
    ),
]
Processes = Annotated[
    int | None, typer.Option(help="So many processes on this machine, each with its own models. (default: this one)")
]
Devices = Annotated[str | None, typer.Option(metavar="0,1,...", help="A process for each of these devices.")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="On a Ray cluster; local starts one on this machine.")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Never ask the network; fail at once if something is missing.")
]
Strict = Annotated[bool, typer.Option("--strict", help="A condition that looks wrong is an error, not a warning.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. (default: by the device)")]
EngineFlag = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="What runs the networks: eager (torch), graphs (CUDA), compiled (torch.compile) or openvino. (default: "
        "graphs on CUDA; on a CPU openvino for large bases, if it is installed)",
    ),
]
BaseName = Annotated[str | None, typer.Option("--base", help=field_docs(Job)["base"])]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on standard error.")]


def default_base() -> str:
    """$CONTROLNET_BASE, else what `models use` said, else tiny."""
    if name := os.environ.get("CONTROLNET_BASE"):
        return name
    try:
        return _base_file().read_text().strip() or "tiny"
    except OSError:
        return "tiny"


def use_base(name: str) -> Path:
    """Make a base the default one; the file that says so."""
    write_file(_base_file(), f"{name}\n".encode())
    return _base_file()


def _base_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "controlnet" / "base"
