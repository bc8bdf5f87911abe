"""`controlnet check MAP...`: what is wrong with condition maps, before hours are lost; and the mended ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from controlnet.cli.options import Json, Overwrite, Recursive, say
from controlnet.preprocessors.errors import ControlNetError, Exit, InputError, OutputError, UsageError
from controlnet.preprocessors.jsons import dumps

if TYPE_CHECKING:
    from controlnet.preprocessors.condition import Condition
    from controlnet.preprocessors.doubts.look import Doubt

Maps = Annotated[list[str], typer.Argument(metavar="MAP", help="Maps, or folders of maps.")]
Kind = Annotated[
    str | None, typer.Option(metavar="KIND", help="What they are. (default: as their PNG text or names say)")
]
Canvas = Annotated[str | None, typer.Option("--size", help="The canvas that they are for, WIDTHxHEIGHT.")]
Out = Annotated[str | None, typer.Option("-o", "--out", help="Where mended maps go: a .png, or a folder.")]
Fix = Annotated[bool, typer.Option("--fix", help="Write NAME.fixed.KIND.png, or -o, with all mended that can be.")]


def check(
    maps: Maps,
    kind: Kind = None,
    size: Canvas = None,
    fix: Fix = False,
    out: Out = None,
    recursive: Recursive = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    from controlnet.model.work.maps import expand
    from controlnet.model.work.outputs import is_folder
    from controlnet.preprocessors.doubts import doubts_of
    from controlnet.preprocessors.geometry import parse_size

    if out is not None and not fix:
        raise UsageError(f"-o {out} without --fix: nothing is written", "--fix")
    canvas = parse_size(size) if size else None
    if kind is not None:
        check_kind(kind)
    sources = expand(maps, recursive, say, maps_too=True, again="check")
    if fix and out is not None and len(sources) > 1 and not is_folder(out):
        raise UsageError(f"-o {out} takes one map, but there are several", f"-o {Path(out).with_suffix('')}/")
    taken: dict[Path, str] = {}
    doubted, failed = False, 0
    for source in sources:
        try:
            condition = _read(source, kind)
            target: Path | None = None
            mended: list[Doubt] = []
            if fix:
                condition, target, mended = _mended(condition, source, out, len(sources) > 1, overwrite, taken)
            found = doubts_of(condition, canvas)
        except ControlNetError as error:
            if len(sources) == 1:
                raise
            failed += 1
            say(f"error: {error}")
            continue
        doubted = doubted or bool(found)
        _say(source, condition, found, target, mended, as_json)
    if failed or doubted:
        raise typer.Exit(Exit.PARTIAL if failed else Exit.INPUT)


def check_kind(kind: str) -> None:
    """Raises UsageError for a word that is no kind."""
    import difflib

    from controlnet.preprocessors.detectors.registry import add_plugins
    from controlnet.preprocessors.kinds import KINDS

    if kind not in KINDS:
        add_plugins()
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1) or list(KINDS)
        raise UsageError(f"--kind {kind!r}: expected one of {', '.join(KINDS)}", f"--kind {near[0]}")


def _read(source: str, kind: str | None) -> Condition:
    from controlnet.preprocessors.condition import read_condition

    try:
        return read_condition(source, kind)
    except UsageError as error:  # its hint is for --cond
        raise UsageError(str(error), "--kind canny") from error


def _mended(
    condition: Condition, source: str, out: str | None, several: bool, overwrite: bool, taken: dict[Path, str]
) -> tuple[Condition, Path | None, list[Doubt]]:
    """A condition without what can be mended, where it was written, and what was mended; nothing is written if that is
    nothing. `taken` remembers what was written, and of what."""
    from controlnet.model.work.outputs import keeps, output_path
    from controlnet.preprocessors.doubts import mend
    from controlnet.preprocessors.files import exists, write_file
    from controlnet.preprocessors.images import read_bytes, sixteen_bits

    map_, mended = mend(condition)
    if not mended:
        return condition, None, []
    if sixteen_bits(read_bytes(source)):
        raise InputError(f"{source}: has 16 bits a level; the mended map would have 8", "make it again with --raw")
    name = Path(source).stem.removesuffix(f".{condition.kind}")
    target = output_path(out, Path(source).with_name(f"{name}.fixed.{condition.kind}.png"), several)
    if target is None:
        raise UsageError("-o -: a mended map goes to a file", "-o mended.png")
    if target in taken:
        raise OutputError(f"{target}: {taken[target]} is written there too", "rename one, or another -o for each")
    if exists(target) and not overwrite:
        raise OutputError(f"{target}: exists already", "--overwrite to replace it")
    keeps(target, overwrite, skip_existing=False)
    record = condition.record | {"kind": condition.kind, "mended": [doubt.what for doubt in mended]}
    fixed = replace(condition, map=map_, record=record, alpha=None)
    write_file(target, fixed.png())
    taken[target] = source
    return fixed, target, mended


def _say(
    source: str, condition: Condition, found: list[Doubt], target: Path | None, mended: list[Doubt], as_json: bool
) -> None:
    if as_json:
        told = [{"what": doubt.what, "text": doubt.text, "cure": doubt.cure} for doubt in found]
        line = {"map": source, "kind": condition.kind, "size": list(condition.size), "doubts": told}
        print(dumps(line | ({"output": str(target), "mended": [doubt.what for doubt in mended]} if target else {})))
        return
    for doubt in mended:
        print(f"{source}: {doubt.what}: mended in {target}")
    for doubt in found:
        print(f"{source}: {doubt.what}: {doubt.text}\n  hint: {doubt.cure}")
    if not found and not mended:
        print(f"{source}: nothing to doubt ({condition.kind}, {condition.size[0]}x{condition.size[1]})")
