"""`controlnet detect KIND PHOTO...`: photos become condition maps.

Each kind is a sub-command whose flags come from its detectors' options dataclasses, built when it is called.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.options import (
    Json,
    Offline,
    Out,
    Overwrite,
    Quiet,
    SkipExisting,
    field_doc,
    keeps,
    output_path,
    say,
    tell,
    warn,
)
from controlnet.preprocessors.errors import ControlNetError, Exit, InputError, NothingFoundError, UsageError
from controlnet.preprocessors.registry import DETECTORS, Detector, Maker, find_detector
from typer.core import TyperGroup

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="PHOTO", help="Pictures, folders of pictures, or - for standard input; pose also draws OpenPose JSON."
    ),
]
Size = Annotated[str, typer.Option(help="Size of the map: WIDTHxHEIGHT, or one number for a square. Multiples of 8.")]
Resize = Annotated[
    str, typer.Option(help="How the photo is brought to the size: crop, pad, stretch, or keep (its own size).")
]
DetectorName = Annotated[
    str | None, typer.Option("--detector", help="Another detector of this kind; see detect --list.")
]
WeightsFolder = Annotated[
    Path | None, typer.Option("--weights", metavar="DIR", help="Folder with the weights of the detector.")
]
KeyPoints = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write the key points in OpenPose's JSON; a folder for several photos."),
]
Recursive = Annotated[bool, typer.Option("-r", "--recursive", help="Search folders inside folders too.")]


class KindGroup(TyperGroup):
    """Builds the command of a kind when it is called, so that help imports no detector."""

    def resolve_command(self, ctx, args):
        return args[0], _command(find_detector(args[0])), args[1:]


app = typer.Typer(cls=KindGroup, invoke_without_command=True, help="Make condition maps from photos.")


@app.callback()
def _detect(
    ctx: typer.Context,
    list_: Annotated[bool, typer.Option("--list", help="List the kinds and their detectors.")] = False,
    as_json: Json = False,
) -> None:
    if list_:
        for detectors in DETECTORS.values():
            for i, row in enumerate(detectors.values()):
                line = {"kind": row.kind, "detector": row.name, "default": i == 0, "help": row.help,
                        "weights": _weights_of(row)}  # fmt: skip
                print(json.dumps(line) if as_json else _row(line))
        raise typer.Exit
    if ctx.invoked_subcommand is None and not ctx.args:
        raise UsageError("which kind of map?", f"controlnet detect {next(iter(DETECTORS))} PHOTO")


def _weights_of(row: Detector) -> dict | None:
    from controlnet.preprocessors.weights import WEIGHTS, kept

    if not row.weights:
        return None
    weights = WEIGHTS[row.weights]
    return {"name": weights.name, "source": f"{weights.source} {weights.file}".strip(), "bytes": weights.size,
            "licence": weights.licence, "sha256": weights.sha256 or None,
            "here": kept(weights.name) is not None}  # fmt: skip


def _row(line: dict) -> str:
    weights = line["weights"]
    told = "no weights"
    if weights:
        told = f"weights {weights['name']}, {weights['bytes'] / 1e6:.0f} MB, {weights['licence']}, " + (
            "here" if weights["here"] else f"not here: controlnet models pull {weights['name']}"
        )
    return f"{line['kind']:10} {line['detector']:12} {line['help']} ({told})"


for _kind in DETECTORS:
    app.command(_kind, help=find_detector(_kind).help)(lambda: None)


def _command(default: Detector):
    """The command of a kind: the common flags, then one flag a field of its options."""
    all_options = {
        field.name: (field, row.load_options())
        for row in reversed(DETECTORS[default.kind].values()) for field in fields(row.load_options())
    }  # fmt: skip
    own = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
            annotation=Annotated[_type_of(field), typer.Option(_flag(field.name), help=field_doc(owner, field.name))],
        )
        for field, owner in all_options.values()
    ]  # fmt: skip

    def command(detector, weights=None, offline=False, keypoints=None, **given):
        chosen = find_detector(default.kind, detector)
        values = {name: given.pop(name) for name in all_options}
        known = {field.name for field in fields(chosen.load_options())}
        for name, value in values.items():
            if name not in known and value != all_options[name][0].default:
                raise UsageError(
                    f"{_flag(name)} is not an option of detector {chosen.name}", f"leave {_flag(name)} out"
                )
        options = chosen.load_options()(**{name: value for name, value in values.items() if name in known})
        run(chosen, options, chosen.ready(options, weights, offline), keypoints, **given)

    def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    signature = inspect.Signature([
        parameter("inputs", Inputs), parameter("out", Out, None), parameter("as_json", Json, False),
        parameter("size", Size, "512"), parameter("resize", Resize, "crop"), parameter("detector", DetectorName, None),
        parameter("recursive", Recursive, False), parameter("overwrite", Overwrite, False),
        parameter("skip_existing", SkipExisting, False), parameter("quiet", Quiet, False), *own,
        *[parameter("weights", WeightsFolder, None), parameter("offline", Offline, False)] * bool(default.weights),
        *[parameter("keypoints", KeyPoints, None)] * (default.kind == "pose"),
    ])  # fmt: skip
    command.__signature__ = signature  # type: ignore[attr-defined]  # what Typer reads
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(default.kind, help=default.help, context_settings={"help_option_names": ["-h", "--help"]})(command)
    return typer.main.get_command(single)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _type_of(field) -> type:
    return {"int": int, "float": float, "bool": bool, "str": str}[
        field.type if isinstance(field.type, str) else field.type.__name__
    ]


def run(detector: Detector, options: Any, make: Maker, keypoints: Path | None, inputs: list[str], out: str | None,
        as_json: bool, size: str, resize: str, recursive: bool, overwrite: bool, skip_existing: bool, quiet: bool,
        ) -> None:  # fmt: skip
    """Make a map of every input. One bad input of several is reported and the rest goes on (exit code PARTIAL)."""
    from controlnet.preprocessors.geometry import RESIZES, parse_size

    wanted = parse_size(size)
    if resize not in RESIZES:
        raise UsageError(f"--resize {resize!r}: expected one of {', '.join(RESIZES)}", "--resize crop")
    sources = expand(inputs, recursive)
    # Standard input has no folder of its own: its map goes to standard output unless -o names a place.
    targets = {
        s: output_path("-" if s == "-" and out is None else out, _default(s, detector.kind), len(sources) > 1)
        for s in sources
    }
    if len(set(targets.values())) < len(targets):
        twice = next(p for p in targets.values() if list(targets.values()).count(p) > 1)
        raise UsageError(f"two inputs would both be written to {twice}", "rename one, or run them with different -o")
    several = len(sources) > 1 or (keypoints is not None and keypoints.is_dir())
    failed = 0
    for source in _progress(sources, quiet):
        try:
            _one(detector, options, make, source, targets[source], wanted, resize, as_json, overwrite, skip_existing,
                 keypoints and (keypoints / f"{Path(source).stem}.json" if several else keypoints))  # fmt: skip
        except ControlNetError as error:
            if len(sources) == 1:
                raise
            failed += 1
            say(f"error: {error}")
    if failed:
        say(f"{failed} of {len(sources)} inputs failed")
        raise typer.Exit(Exit.PARTIAL)


def _one(detector: Detector, options: Any, make: Maker, source: str, target: Path | None, size: tuple[int, int],
         resize: str, as_json: bool, overwrite: bool, skip_existing: bool, keypoints: Path | None) -> None:  # fmt: skip
    if target and keeps(target, overwrite, skip_existing):
        tell({"output": str(target), "source": source, "kind": detector.kind, "skipped": True}, as_json)
        return
    from controlnet.preprocessors.detect import detect, record
    from controlnet.preprocessors.images import png_bytes, read_bytes, read_image, write_file
    from controlnet.preprocessors.keypoints import draw_json, to_json
    from controlnet.preprocessors.metadata import dump

    data = read_bytes(source)
    if detector.kind == "pose" and source.endswith(".json"):
        map_, fields = draw_json(data, source, size, resize)
    else:
        image, _ = read_image(data, source, warn)
        try:
            map_, fields = detect(image, make, size, resize)
        except NothingFoundError as error:
            raise NothingFoundError(f"{source}: {error}", error.hint) from error
    made = record(detector, options, (map_.shape[1], map_.shape[0]), resize, Path(source).name, data) | fields
    png = png_bytes(map_, dump(made))
    if keypoints is not None:
        keeps(keypoints, overwrite, skip_existing=False)
        write_file(keypoints, to_json(fields["keypoints"], (map_.shape[1], map_.shape[0])))
    if target is None:
        sys.stdout.buffer.write(png)
        sys.stdout.flush()
        return
    write_file(target, png)
    tell({"output": str(target), **made, "source": source}, as_json)


def _default(source: str, kind: str) -> Path:
    path = Path("stdin" if source == "-" else source)
    return path.with_name(f"{path.stem}.{kind}.png")


def expand(inputs: list[str], recursive: bool) -> list[str]:
    """Folders become the pictures in them, sorted, without earlier maps (`*.KIND.png`). Raises InputError for a folder
    without pictures."""
    from controlnet.preprocessors.images import SUFFIXES
    from controlnet.preprocessors.metadata import KINDS

    maps = tuple(f".{kind}.png" for kind in KINDS)
    sources: list[str] = []
    for name in inputs:
        if name == "-" or not Path(name).is_dir():
            sources.append(name)
            continue
        found = sorted(
            str(path)
            for path in Path(name).glob("**/*" if recursive else "*")
            if path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.endswith(maps)
        )
        if not found:
            raise InputError(
                f"{name}: the folder holds no pictures ({', '.join(SUFFIXES)})",
                f"controlnet detect canny {name} --recursive",
            )
        sources += found
    return list(dict.fromkeys(sources))


def _progress(sources: list[str], quiet: bool):
    """A bar on standard error when someone is watching many files."""
    if quiet or len(sources) < 4 or not sys.stderr.isatty():
        return sources
    from rich.console import Console
    from rich.progress import track

    return track(sources, "detect", console=Console(stderr=True), transient=True)
