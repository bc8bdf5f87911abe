"""`controlnet detect KIND PHOTO...`: photos become condition maps.

Each kind is a sub-command whose flags come from its detectors' options dataclasses, built when it is called.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.help import finish
from controlnet.cli.making import make_maps
from controlnet.cli.options import (
    Json,
    Offline,
    Overwrite,
    Processes,
    Quiet,
    RayAddress,
    Recursive,
    ShardFlag,
    SkipExisting,
    command_named,
    field_docs,
    parameter,
    say,
)
from controlnet.preprocessors.detectors.detector import Detector, On
from controlnet.preprocessors.detectors.registry import DETECTORS, add_plugins, find_detector
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.imports import uncollected
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.kinds import can_be_steadied
from controlnet.preprocessors.weights import WEIGHTS, digests, is_here
from typer.core import TyperGroup

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="PHOTO",
        help="Pictures, folders of pictures, videos, or - for standard input; pose also draws OpenPose JSON.",
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--out",
        help="Where maps go: a .png, of a video a .mp4, .mov, .mkv or .avi; a folder; - for standard output.",
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
Preview = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also make a contact sheet of the first photos and their maps.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps. (default: the best of this machine)")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. (default: as suits the network)")]


Every = Annotated[int, typer.Option(metavar="N", help="Of a video, each N-th frame.")]
SteadyFlag = Annotated[bool, typer.Option("--steady", help="Hold a video's poses or depth steady over time.")]


class KindGroup(TyperGroup):
    """Builds the command of a kind when it is called, so that help imports no detector."""

    def list_commands(self, ctx):
        for line in add_plugins():
            say(f"warning: {line}")
        return [*DETECTORS, *(name for name in super().list_commands(ctx) if name not in DETECTORS)]

    def get_command(self, ctx, name):
        return super().get_command(ctx, name) or _command(find_detector(name))

    def resolve_command(self, ctx, args):
        flags = [arg.split("=")[0] for arg in args]
        if args[0] == "all" or {"--detector", "--help", "-h"} & set(flags):
            add_plugins()  # else they are looked for when their kind is asked for
        with uncollected():
            command = _all_command() if args[0] == "all" else _command(find_detector(args[0]))
            return args[0], finish(command, f"detect {args[0]}"), args[1:]


app = typer.Typer(
    cls=KindGroup, invoke_without_command=True, help="Make condition maps from photos.", add_completion=False
)


@app.callback()
def _detect(
    ctx: typer.Context,
    list_: Annotated[bool, typer.Option("--list", help="List the kinds and their detectors.")] = False,
    as_json: Json = False,
) -> None:
    if list_:
        for line in add_plugins():
            say(f"warning: {line}")
        for kind, detectors in DETECTORS.items():
            if not as_json:
                print(textwrap.fill(f"{kind}: {find_detector(kind).help}", 80, subsequent_indent="  "))
            for i, row in enumerate(detectors.values()):
                print(dumps(_facts(row, i == 0)) if as_json else _row(row))
        raise typer.Exit
    if ctx.invoked_subcommand is None and not ctx.args:
        raise UsageError("which kind of map?", f"controlnet detect {next(iter(DETECTORS))} PHOTO")


def _facts(row: Detector, default: bool) -> dict[str, Any]:
    """A detector as `--json` shows it."""
    return {
        "kind": row.kind,
        "detector": row.name,
        "default": default,
        "help": row.help,
        "needs": row.needs[1] or None,
        "devices": "any of torch" if row.torch else "cpu",
        "weights": [
            {
                "name": name,
                "source": WEIGHTS[name].source,
                "sources": [origin.place for origin in WEIGHTS[name].origins],
                "bytes": WEIGHTS[name].size,
                "licence": WEIGHTS[name].licence,
                "sha256": digests(name),
                "here": is_here(name),
            }
            for name in row.weights
        ],
    }


def _row(row: Detector) -> str:
    """A detector as a line of at most 80 letters: name, megabytes, whether its weights are here, licence."""
    if not row.weights:
        return f"  {row.name:24}     no weights"
    size = sum(WEIGHTS[name].size for name in row.weights) / 1e6
    here = "here" if all(map(is_here, row.weights)) else "to pull"
    licence = ", ".join(dict.fromkeys(WEIGHTS[name].licence for name in row.weights))
    extra = f" [{row.needs[1]}]" if row.needs[1] else ""
    return f"  {row.name:24} {size:5.0f} MB  {here:8} {licence}{extra}"


ALL_HELP = "A map of every kind, by the default detectors, and a sheet of them all."
for _kind in DETECTORS:
    app.command(_kind, help=find_detector(_kind).help)(lambda: None)
app.command("all", help=ALL_HELP)(lambda: None)


def _command(default: Detector):
    """The command of a kind: the common flags, then a flag for each field of its options."""
    # The options of all its detectors; if two have an option of the same name, the default detector's.
    all_options = {
        field.name: (field, row.load_options())
        for row in reversed(DETECTORS[default.kind].values())
        for field in fields(row.load_options())
    }

    # Each becomes a flag.
    own = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[
                _type_of(field), typer.Option(_flag(field.name), help=field_docs(owner).get(field.name, ""))
            ],
        )
        for field, owner in all_options.values()
    ]

    def command(detector, weights=None, offline=False, keypoints=None, device=None, dtype=None, **given):
        chosen = find_detector(default.kind, detector)
        values = {name: given.pop(name) for name in all_options}
        known = {field.name for field in fields(chosen.load_options())}
        for name, value in values.items():
            if name not in known and value != all_options[name][0].default:
                owners = [
                    row.name
                    for row in DETECTORS[default.kind].values()
                    if name in {field.name for field in fields(row.load_options())}
                ]
                raise UsageError(f"{_flag(name)} is not an option of detector {chosen.name}", f"--detector {owners[0]}")
        options = chosen.load_options()(**{name: value for name, value in values.items() if name in known})
        if (device or dtype) and not chosen.torch:
            raise UsageError(f"detector {chosen.name} runs on the processor alone", "leave --device and --dtype out")
        make_maps([(chosen, options)], weights, offline, keypoints, On(device, dtype), **given)

    # In the order of the help page.
    learned = any(row.weights for row in DETECTORS[default.kind].values())
    on_torch = any(row.torch for row in DETECTORS[default.kind].values())
    return command_named(
        command,
        default.kind,
        default.help,
        [
            *COMMON,
            *[parameter("steady", SteadyFlag, False)] * can_be_steadied(default.kind),
            parameter("detector", DetectorName, None),
            *own,
            *[parameter("weights", WeightsFolder, None)] * learned,
            parameter("offline", Offline, False),
            *[parameter("device", Device, None), parameter("dtype", Dtype, None)] * on_torch,
            *[parameter("keypoints", KeyPoints, None)] * (default.kind == "pose"),
        ],
    )


def _all_command():
    """The command that makes a map of every kind, with the default detectors and options."""

    def command(offline, **given):
        chosen = [find_detector(kind) for kind in DETECTORS]
        make_maps([(row, row.load_options()()) for row in chosen], None, offline, None, On(), **given)

    return command_named(command, "all", ALL_HELP, [*COMMON, parameter("offline", Offline, False)])


COMMON = [
    parameter("inputs", Inputs), parameter("out", Out, None), parameter("as_json", Json, False),
    parameter("size", Size, "512"), parameter("resize", Resize, "crop"), parameter("recursive", Recursive, False),
    parameter("overwrite", Overwrite, False), parameter("skip_existing", SkipExisting, False),
    parameter("preview", Preview, None), parameter("quiet", Quiet, False), parameter("shard", ShardFlag, None),
    parameter("processes", Processes, None), parameter("ray", RayAddress, None), parameter("every", Every, 1),
]  # fmt: skip


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _type_of(field) -> type:
    return {"int": int, "float": float, "bool": bool, "str": str}[
        field.type if isinstance(field.type, str) else field.type.__name__
    ]
