"""`controlnet dataset check DATA` and `controlnet dataset build PHOTOS`: training data, before a day is spent on it."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from controlnet.cli.bars import count_bar
from controlnet.cli.options import Json, Quiet, RayAddress, ShardFlag, say, warn
from controlnet.model.work.cluster import share
from controlnet.model.work.crew import killed_twice, without_models
from controlnet.model.work.outputs import keeps
from controlnet.preprocessors.data.pack import check_form, is_packed, pack
from controlnet.preprocessors.data.pairs import SHEET_SUFFIX, Pairs, find_pairs, kind_of_pairs
from controlnet.preprocessors.data.stream import find_data, is_stream
from controlnet.preprocessors.errors import ControlNetError, Exit, OutputError, UsageError
from controlnet.preprocessors.geometry import parse_size
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.metadata import sha256
from controlnet.preprocessors.remote import is_url, place
from controlnet.preprocessors.shards import claim, parse_shard
from controlnet.preprocessors.sheet import write_sheet
from controlnet.preprocessors.weights import cache_folder

app = typer.Typer(no_args_is_help=True, help="Check training data, or build it from photos.", add_completion=False)
SHOWN = 3


@app.command("check", help="Check every pair and make a contact sheet; exit code 3 when training would suffer.")
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="What `train` takes; of shards the first pairs.")],
    kind: Annotated[str | None, typer.Option(help="The kind of condition. (default: taken from the data)")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Contact sheet. (default: DATA-check.png beside DATA)")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from controlnet.preprocessors.data.check import check_pairs, kind_or_unknown

    found = find_data(data)
    place, name = Path(data).parent, Path(data).resolve().name
    if is_stream(data):  # its folder is often not here
        words = "-".join(Path(data).with_suffix("").parts[-2:])
        place, name = Path(), re.sub(r"[^\w.]+", "-", words).strip("-.")
    sheet = out or place / f"{name}{SHEET_SUFFIX}"
    named, unknown = kind_or_unknown(found, kind)
    if unknown:
        warn(f"{unknown}; lines are not checked for polarity")
    with count_bar("checking", len(found.pairs), quiet) as on_pair:
        counts, problems, previews = check_pairs(found, named, on_pair)
    if previews:
        try:
            write_sheet(sheet, previews, 4)
        except OutputError as error:  # data of someone else's: the words are what counts
            if out is not None:
                raise
            warn(f"no contact sheet: {error}; -o FILE names another place")
            previews = []
    if as_json:
        print(dumps({"output": str(sheet), **counts, "problems": [vars(p) for p in problems]}))
    else:
        print(f"{counts['pairs']} pairs, form {counts['form']}, kind {counts['kind']}")
        print("sizes: " + ", ".join(f"{size} ({n})" for size, n in counts["sizes"].items()))
        for (level, what), number in Counter((p.level, p.what) for p in problems).items():
            print(f"{level}: {number} x {what}")
            for problem in [p for p in problems if p.what == what][:SHOWN]:
                print(f"    {problem.where}")
        seen = f"; look at {sheet}" if previews else ""
        print(f"{counts['errors']} errors, {counts['warnings']} warnings{seen}")
    if counts["errors"]:
        raise typer.Exit(Exit.INPUT)


To = Annotated[
    str | None,
    typer.Option("--to", metavar="FORM", help="Pack the pairs into large files: webdataset (tar) or parquet."),
]
PerFile = Annotated[int, typer.Option("--per-file", help="Pairs in each of them.")]


@app.command("build", help="Make pairs from photos: pictures and conditions of one size, captions, manifest, split.")
def build(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="A folder of photos, captions in .txt or metadata.")],
    out_: Annotated[
        str,
        typer.Option("-o", "--out", help="Folder of the data set, with --to also a URL. What is there is kept."),
    ],
    kind_: Annotated[
        str | None,
        typer.Option("--kind", help="The kind of condition; its default detector makes it. (default: canny)"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the detector.")
    ] = None,
    size: Annotated[str, typer.Option(help="Size of pictures and maps: WIDTHxHEIGHT, or one number.")] = "512",
    resize: Annotated[str, typer.Option(help="crop, pad or stretch.")] = "crop",
    jobs: Annotated[int | None, typer.Option("-j", "--processes", help="Processes. (default: one per core)")] = None,
    ray: RayAddress = None,
    form: To = None,
    per_file: PerFile = 1000,
    shard: ShardFlag = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from controlnet.preprocessors.data.build import build, options_of

    if resize not in ("crop", "pad", "stretch"):
        raise UsageError(f"--resize {resize!r}: expected crop, pad or stretch", "--resize crop")
    found, kind = find_pairs(photos), kind_ or "canny"
    packed = place(out_)
    out = _pairs_of(packed) if form is not None else packed
    _check_build(photos, found, out, packed, form, per_file, shard)
    if found.form != "photos" and form is not None:
        _pack(found, packed, form, kind_of_pairs(found, kind_ or "")[0], per_file, as_json, quiet)
        return
    options = options_of(kind, set_ or [])
    keeps(out / "manifest.json", overwrite=True, skip_existing=False)

    # Our part of it, and what came of it.
    part = parse_shard(shard)
    claim(out, part, [kind, options, size, resize, [str(pair.image) for pair in found.pairs]])
    share = None if ray is None else partial(_on_ray, ray)
    with count_bar("building", len(found.pairs), quiet) as on_pair:
        manifest, failed = build(found, out, kind, options, parse_size(size), resize, jobs, on_pair, part, share)
    _warn_of(found, failed)
    if manifest is None:
        say(f"{part.name} is done; the shard that finishes last writes the manifest")
    elif form is not None:
        _pack(find_pairs(out), packed, form, kind, per_file, as_json, quiet)
        shutil.rmtree(out)
        if failed:
            raise typer.Exit(Exit.PARTIAL)
        return
    else:
        say(f"{manifest['pairs']} pairs, {manifest['held_out']} of them held out; now: controlnet train {out}")
    print(dumps({"output": str(out), **(manifest or {})}) if as_json else out)
    if failed:
        raise typer.Exit(Exit.PARTIAL)


def _warn_of(found: Pairs, failed: list[str]) -> None:
    for reason in (*failed, *found.skipped):
        warn(reason)
    if without := sum(not p.caption for p in found.pairs):
        warn(f"{without} of {len(found.pairs)} photos have no caption")


def _check_build(
    photos: Path, found: Pairs, out: Path, packed: Path, to: str | None, per_file: int, shard: str | None
) -> None:
    """Raises UsageError for what `build` cannot do, OutputError if the data set is there already."""
    if is_url(out):
        raise UsageError(f"-o {out}: a URL gets whole files only", "--to webdataset")
    if to is not None:
        check_form(to)
    if per_file < 1:
        raise UsageError(f"--per-file {per_file}: expected 1 or more", "--per-file 1000")
    if out.resolve().is_relative_to(photos.resolve()) and not (out / "manifest.json").is_file():
        beside = f"{photos.resolve()}-data"
        hint = f"-o {quote(beside if photos.is_absolute() else os.path.relpath(beside))}"
        raise UsageError(f"{out}: lies in the folder of the photos, and would be taken for photos", hint)
    if found.form != "photos" and to is None:
        hint = f"controlnet train {photos}; or --to webdataset packs them"
        raise UsageError(f"{photos}: holds pairs already ({found.form})", hint)
    if found.form != "photos" and shard is not None:
        raise UsageError(f"--shard {shard}: pairs that are there are packed by one process", "without --shard")
    if found.form == "photos" and to is not None and is_packed(packed, to):
        raise OutputError(f"{packed}: holds a data set already", f"-o {packed}-{to}")


def _pairs_of(packed: Path) -> Path:
    """Where pairs lie until they are packed."""
    if not is_url(packed):
        return packed / ".pairs"  # a name that nobody else has: it is removed
    return cache_folder() / "pairs" / sha256(str(packed).encode())[:16]


def _on_ray(address: str, orders: list[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    return share(orders, without_models(work, _died), [], address)


def _died(order: Any) -> tuple[str, ControlNetError]:
    return order[1], killed_twice()


def _pack(found: Pairs, out: Path, to: str, kind: str, per_file: int, as_json: bool, quiet: bool) -> None:
    """Pack pairs into large files, and say so."""
    with count_bar("packing", len(found.pairs), quiet) as on_pair:
        manifest = pack(found, out, to, kind, per_file, on_pair)
    shards = quote(f"{out}/" + ("*.tar" if to == "webdataset" else "train-*.parquet"))
    say(f"{manifest['pairs']} pairs, {manifest['held_out']} of them held out; now: controlnet train {shards}")
    print(dumps({"output": str(out), **manifest}) if as_json else out)
