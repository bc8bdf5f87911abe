"""`controlnet replay IMAGE`: an image is made again from its PNG text; how far off that is, and what differs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from controlnet.cli.conditions import ConditionFlag, parse_scale, parse_weighting
from controlnet.cli.options import Device, Json, Offline, Overwrite, check_png, keeps, say, tell
from controlnet.preprocessors.errors import ControlNetError, Exit, InputError, UsageError, reason
from controlnet.preprocessors.files import is_file
from controlnet.preprocessors.jsons import dumps

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
Size = Annotated[str | None, typer.Option(help="Make it in another size: needs -o, and compares nothing.")]
Seed = Annotated[int | None, typer.Option(help="Make it with another seed: needs -o, and compares nothing.")]
Steps = Annotated[int | None, typer.Option(help="Make it in so many steps: needs -o, and compares nothing.")]


MOST_TOGETHER = 64


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
    image: Image, cond: Cond = None, out: Out = None, size: Size = None, seed: Seed = None, steps: Steps = None,
    device: Device = None, as_json: Json = False, overwrite: Overwrite = False, offline: Offline = False,
) -> None:  # fmt: skip
    from controlnet.cli.images import Studio
    from controlnet.cli.jobs import Wanted
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.geometry import parse_size
    from controlnet.preprocessors.images import read_bytes, read_image
    from controlnet.preprocessors.metadata import load

    pixels, text = read_image(read_bytes(str(image)), str(image))
    before = load(text)
    if "prompt" not in before or "seed" not in before:
        raise InputError(f"{image}: holds no record of its making", "an image as controlnet generate wrote it")
    job = _job(image, before, cond or [])
    given: dict[str, Any] = {"size": size and parse_size(size), "seed": seed, "steps": steps}
    changed = {name: value for name, value in given.items() if value is not None}
    if changed and out is None:
        flags = " ".join(f"--{name}" for name in changed)
        raise UsageError(
            f"{flags} makes another image: where to?", f"controlnet replay {image} {flags} ... -o again.png"
        )
    job = replace(job, **changed)
    if out is not None:
        check_png("-o", out)
        keeps(out, overwrite, skip_existing=False)
    studio = Studio(_available(device or before.get("device")), before.get("dtype"), offline, strict=False,
                    low_memory=bool(before.get("low_memory")))  # fmt: skip

    def failed(name: str, error: ControlNetError) -> None:
        raise error

    # An image away from the base's native size depends, by rounding, on how many are sampled together and on its place
    # among them: as many are sampled again.
    together, place = (1, 0) if changed else _batch(before)
    copies = [Wanted("", job, job.seed or 0, None)] * together
    _, png, after = list(studio.make(copies, failed, lambda images: None))[place]
    again, _ = read_image(png, "again")
    if out is not None:
        write_file(out, png)
    if changed:
        tell({"output": str(out), **after}, as_json)
        return
    if again.shape != pixels.shape:
        raise InputError(
            f"{image}: {pixels.shape[1]}x{pixels.shape[0]} pixels, but its record says {after['size']}",
            "the image was resized after it was made: replay the one that generate wrote",
        )
    off, causes = compare(pixels, again), sorted(changes(before, after))
    same = off.largest == 0
    if as_json:
        told = {"largest": off.largest, "mean": round(off.mean, 4), "changed": round(off.changed, 4)}
        print(dumps({"image": str(image), "identical": same, **told, "differs": causes}))
    elif same:
        print("identical")
    else:
        print(f"differs: by up to {off.largest} of 255 levels, {off.mean:.3f} in the mean, "
              f"in {off.changed:.1%} of the pixels")  # fmt: skip
    for cause in causes if not as_json else ():
        say(f"not as recorded: {cause}")
    if not same:
        raise typer.Exit(Exit.DIFFERENT)


def _batch(record: dict) -> tuple[int, int]:
    """(how many images were sampled together, this one's place among them), as recorded."""
    count, place = record.get("batch", 1), record.get("place", 0)
    if isinstance(count, int) and isinstance(place, int) and 0 <= place < count <= MOST_TOGETHER:
        return count, place
    return 1, 0


def changes(before: dict, after: dict) -> list[str]:
    """What two records say differently about models, conditions and machine: a line each."""
    found = []
    for name in ("base_sha256", "device", "dtype", "threads", "low_memory", "batch"):
        if (before.get(name) or None) != (after[name] or None):
            found.append(f"{name}: {before.get(name)}, now {after[name]}")
    for name, version in after["versions"].items():
        if (was := (before.get("versions") or {}).get(name)) != version:
            found.append(f"{name}: {was}, now {version}")
    for old, new in zip(before.get("conditions") or [], after["conditions"], strict=False):
        for name in ("sha256", "map_sha256", "net_sha256", "region_sha256"):
            if old.get(name) != new.get(name):
                found.append(f"{new['path']}: {name} {str(old.get(name))[:12]}, now {str(new.get(name))[:12]}")
    return found


_RECORD: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "negative": (str,), "steps": (int,), "guidance": (int, float), "base": (str,), "size": (list,),
    "seed": (int,), "scheduler": (str,), "conditions": (list, type(None)), "control_on": (str, type(None)),
    "device": (str, type(None)), "dtype": (str, type(None)), "versions": (dict, type(None)),
}  # fmt: skip
_CONDITION: dict[str, tuple[type, ...]] = {
    "path": (str,), "kind": (str,), "net": (str,), "scale": (int, float, str), "start": (int, float),
    "end": (int, float), "weighting": (str, type(None)), "region": (str, type(None)), "detect": (dict, type(None)),
}  # fmt: skip
"""What a record holds, and of which types; what may be None may be missing."""


def _check(fields: Any, types: dict[str, tuple[type, ...]], image: Path) -> None:
    """Raises InputError for a record, or a condition's, that `generate` cannot have written."""
    wrong = "a condition" if not isinstance(fields, dict) else None
    for name, known in types.items():
        if wrong is None and (not isinstance(fields.get(name), known) or isinstance(fields.get(name), bool)):
            wrong = f"{name}: {fields.get(name)!r}"
    if wrong:
        raise InputError(f"{image}: its record is not whole ({wrong})", "replay the file that generate wrote")


def _job(image: Path, record: dict, moved: list[str]) -> Job:
    """The job of a record. `moved` are the conditions' paths today, if any are given."""
    from controlnet.cli.jobs import Job
    from controlnet.model.sampling.schedulers import SCHEDULERS
    from controlnet.preprocessors.geometry import parse_size

    _check(record, _RECORD, image)
    conditions = record.get("conditions") or []
    for condition in conditions:
        _check(condition, _CONDITION, image)
    if moved and len(moved) != len(conditions):
        raise UsageError(f"--cond is given {len(moved)} times, the image has {len(conditions)} conditions")
    try:
        width, height = record["size"]
        flags = [_flag(c, image, moved[k] if moved else None) for k, c in enumerate(conditions)]
        return Job(
            cond=tuple(flags), prompt=record["prompt"], negative=record["negative"], steps=record["steps"],
            guidance=record["guidance"], base=record["base"], size=parse_size(f"{width}x{height}"), seed=record["seed"],
            scheduler=record["scheduler"] if record["scheduler"] in SCHEDULERS else None,
            control_on=record.get("control_on") or "both",
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise InputError(
            f"{image}: its record is not whole ({reason(error)})", "replay the file that generate wrote"
        ) from error


def _flag(condition: dict[str, Any], image: Path, moved: str | None) -> ConditionFlag:
    path = moved or condition["path"]
    if path == "-":
        raise InputError(f"{image}: its condition came from standard input", f"controlnet replay {image} --cond MAP")
    beside = image.parent / Path(path).name
    if not is_file(path) and is_file(beside):
        path = str(beside)
    scale, detect = condition["scale"], condition.get("detect") or {}
    return ConditionFlag(
        path, str(detect["kind"]) if detect else None, condition["kind"], condition["net"],
        parse_scale("scale", str(scale)), condition["start"], condition["end"],
        parse_weighting("weighting", condition.get("weighting") or "uniform"), condition.get("region"),
    )  # fmt: skip


def _available(device: str | None) -> str | None:
    """The recorded device if this machine has it, else the default one."""
    from controlnet.cli.machine import choose_device

    try:
        return str(choose_device(device))
    except UsageError:
        return None
