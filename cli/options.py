"""The flags that several commands share, and the rules of names and outputs that come with them."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.preprocessors.errors import OutputError, UsageError
from controlnet.preprocessors.files import exists, is_dir
from controlnet.preprocessors.jsons import dumps

Out = Annotated[
    str | None,
    typer.Option(
        "-o", "--out", help="Where the result goes: a .png, a folder (any other name), or - for standard output."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a result instead of its path.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave existing results as they are and go on.")]
Offline = Annotated[
    bool, typer.Option("--offline", help="Never ask the network; fail at once if something is missing.")
]
Strict = Annotated[bool, typer.Option("--strict", help="A condition that looks wrong is an error, not a warning.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. (default: by the device)")]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The text-to-image model: a name of `models list`, a folder in diffusers' layout, a single file, or a hub "
        "id. (default: $CONTROLNET_BASE, what `models use` said, tiny)",
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on standard error.")]


def say(text: str) -> None:
    """Talk goes to standard error; standard output is data."""
    print(text, file=sys.stderr)


def warn(text: str) -> None:
    say(f"warning: {text}")


def tell(fields: dict[str, Any], as_json: bool) -> None:
    """One line of data on standard output: the path, or the whole object."""
    print(dumps(fields) if as_json else fields["output"], flush=True)


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
    from controlnet.preprocessors.files import write_file

    write_file(_base_file(), f"{name}\n".encode())
    return _base_file()


def _base_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "controlnet" / "base"


def output_path(out: str | None, default: Path, several: bool) -> Path | None:
    """The path of a result; None for standard output. `default` is its folder and name when -o says nothing."""
    if out is None:
        return default
    if is_folder(out):
        return Path(out) / default.name
    if several:
        hint = "-o DIR/" if out == "-" else f"-o {Path(out).with_suffix('')}/"
        raise UsageError(f"-o {out} takes one result, but there are several", hint)
    return None if out == "-" else Path(out)


def is_folder(out: str) -> bool:
    """Whether -o names a folder: all but `-` and `NAME.png`. Raises UsageError for another type of picture."""
    path = Path(out)
    if out.endswith("/") or is_dir(path):
        return True
    check_png("-o", path)
    return out != "-" and path.suffix.lower() != ".png"


def check_png(flag: str, path: Path) -> None:
    """Raises UsageError for a file that a PNG would be written to under the name of another type of picture."""
    from controlnet.preprocessors.images import suffixes

    if path.suffix.lower() in suffixes() - {".png", ".apng"}:
        raise UsageError(f"{flag} {path}: pictures are written as PNG files", f"{flag} {path.with_suffix('.png')}")


def keeps(path: Path, overwrite: bool, skip_existing: bool) -> bool:
    """Whether an existing result is to be left alone. Raises OutputError when it is in the way, or when its place
    cannot be written: before the work, not after it."""
    there = next(p for p in path.absolute().parents if exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError(f"{path}: cannot be written, {there} is {'not writable' if there.is_dir() else 'a file'}",
                          "choose another place with -o DIR/")  # fmt: skip
    if is_dir(path):
        raise OutputError(f"{path}: is a folder, expected a file", f"-o {path}/")
    if overwrite or not exists(path):
        return False
    if skip_existing:
        return True
    raise OutputError(f"{path}: exists already", "add --overwrite to replace it, or --skip-existing to leave it")


def field_doc(options: type, name: str) -> str:
    """The docstring under a field of a dataclass, or of the one that it extends."""
    for owner in options.__mro__[:-1]:
        lines = inspect.getsource(owner).splitlines()
        for line, after in zip(lines, lines[1:], strict=False):
            if line.strip().startswith(f"{name}:") and after.strip().startswith('"""'):
                return after.strip().strip('"')
    return ""
