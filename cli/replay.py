"""`controlnet replay IMAGE`: an image is made again from its PNG text; how far off that is, and what differs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from controlnet.cli.conditions import ConditionFlag, parse_scale, parse_weighting
from controlnet.cli.options import Device, Json, Offline, Overwrite, check_png, keeps, say
from controlnet.preprocessors.errors import ControlNetError, Exit, InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from controlnet.cli.jobs import Job

HELP = "Make an image again from its own PNG text; say identical, or how far off and what differs."

Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG that `generate` made.")]
Cond = Annotated[
    list[str] | None,
    typer.Option("--cond", metavar="PATH", help="Where a condition is now, in the recorded order; repeat for several."),
]
Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Also write the image made again.")]


@dataclass(frozen=True)
class Difference:
    """Between two images of equal size, in levels of 0 to 255."""

    largest: int
    mean: float
    changed: float
    """Part of the pixels that differ at all."""


def compare(a: np.ndarray, b: np.ndarray) -> Difference:
    """a and b are (H, W, 3) uint8."""
    import numpy as np

    off = np.abs(a.astype(int) - b)
    return Difference(int(off.max()), float(off.mean()), float((off.max(2) > 0).mean()))


def replay(
    image: Image, cond: Cond = None, out: Out = None, device: Device = None, as_json: Json = False,
    overwrite: Overwrite = False, offline: Offline = False,
) -> None:  # fmt: skip
    from controlnet.cli.images import Studio
    from controlnet.cli.jobs import Wanted
    from controlnet.preprocessors.images import read_bytes, read_image, write_file
    from controlnet.preprocessors.metadata import load

    pixels, text = read_image(read_bytes(str(image)), str(image))
    before = load(text)
    if "prompt" not in before or "seed" not in before:
        raise InputError(f"{image}: holds no record of its making", "an image as controlnet generate wrote it")
    job = _job(image, before, cond or [])
    if out is not None:
        check_png("-o", out)
        keeps(out, overwrite, skip_existing=False)
    studio = Studio(_available(device or before.get("device")), before.get("dtype"), offline, strict=False,
                    low_memory=bool(before.get("low_memory")))  # fmt: skip

    def failed(name: str, error: ControlNetError) -> None:
        raise error

    ((_, png, after),) = studio.make([Wanted("", job, before["seed"], None)], failed, lambda images: None)
    again, _ = read_image(png, "again")
    if out is not None:
        write_file(out, png)
    if again.shape != pixels.shape:
        raise InputError(
            f"{image}: {pixels.shape[1]}x{pixels.shape[0]} pixels, but its record says {after['size']}",
            "the image was resized after it was made: replay the one that generate wrote",
        )
    off, causes = compare(pixels, again), sorted(changes(before, after))
    same = off.largest == 0
    if as_json:
        told = {"largest": off.largest, "mean": round(off.mean, 4), "changed": round(off.changed, 4)}
        print(json.dumps({"image": str(image), "identical": same, **told, "differs": causes}))
    elif same:
        print("identical")
    else:
        print(f"differs: by up to {off.largest} of 255 levels, {off.mean:.3f} in the mean, "
              f"in {off.changed:.1%} of the pixels")  # fmt: skip
    for cause in causes if not as_json else ():
        say(f"not as recorded: {cause}")
    if not same:
        raise typer.Exit(Exit.DIFFERENT)


def changes(before: dict, after: dict) -> list[str]:
    """What two records say differently about models, conditions and machine: a line each."""
    found = []
    for name in ("base_sha256", "device", "dtype", "threads", "low_memory", "batch"):
        if (before.get(name) or None) != (after[name] or None):
            found.append(f"{name}: {before.get(name)}, now {after[name]}")
    for name, version in after["versions"].items():
        if (was := before.get("versions", {}).get(name)) != version:
            found.append(f"{name}: {was}, now {version}")
    for old, new in zip(before.get("conditions", []), after["conditions"], strict=False):
        for name in ("sha256", "map_sha256", "net_sha256", "region_sha256"):
            if old.get(name) != new.get(name):
                found.append(f"{new['path']}: {name} {str(old.get(name))[:12]}, now {str(new.get(name))[:12]}")
    return found


def _job(image: Path, record: dict, moved: list[str]) -> Job:
    """The job of a record. `moved` are the conditions' paths today, if any are given."""
    from controlnet.cli.jobs import Job
    from controlnet.model.schedulers import SCHEDULERS

    conditions = record.get("conditions", [])
    if moved and len(moved) != len(conditions):
        raise UsageError(f"--cond is given {len(moved)} times, the image has {len(conditions)} conditions")
    try:
        flags = [_flag(c, image, moved[k] if moved else None) for k, c in enumerate(conditions)]
        return Job(
            cond=tuple(flags), prompt=record["prompt"], negative=record["negative"], steps=record["steps"],
            guidance=record["guidance"], base=record["base"], size=tuple(record["size"]), seed=record["seed"],
            scheduler=record["scheduler"] if record["scheduler"] in SCHEDULERS else None,
            control_on=record.get("control_on", "both"),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{image}: its record is not whole ({error})", "replay the file that generate wrote"
        ) from error


def _flag(condition: dict[str, Any], image: Path, moved: str | None) -> ConditionFlag:
    path = moved or condition["path"]
    if path == "-":
        raise InputError(f"{image}: its condition came from standard input", f"controlnet replay {image} --cond MAP")
    beside = image.parent / Path(path).name
    if not Path(path).is_file() and beside.is_file():
        path = str(beside)
    scale = condition["scale"]
    return ConditionFlag(
        path, condition["detect"]["kind"] if "detect" in condition else None, condition["kind"], condition["net"],
        parse_scale("scale", scale) if isinstance(scale, str) else scale, condition["start"], condition["end"],
        parse_weighting("weighting", condition.get("weighting", "uniform")), condition.get("region"),
    )  # fmt: skip


def _available(device: str | None) -> str | None:
    """The recorded device if this machine has it, else the default one."""
    from controlnet.cli.machine import choose_device

    try:
        return str(choose_device(device))
    except UsageError:
        return None
