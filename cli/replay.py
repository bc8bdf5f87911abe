"""`controlnet replay IMAGE`: make an image again from its PNG text; say how far off it is, and what differs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.options import Device, Json, Offline, Overwrite, say, tell
from controlnet.model.work.jobs import OPTIONS
from controlnet.model.work.machine import silence_libraries
from controlnet.model.work.outputs import IMAGES, keeps, output_path
from controlnet.preprocessors.errors import Exit, InputError, OutputError, UsageError
from controlnet.preprocessors.files import exists, write_file
from controlnet.preprocessors.jsons import dumps

Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image that `generate` made.")]
Cond = Annotated[
    list[str] | None,
    typer.Option("--cond", metavar="PATH", help="Where a condition is now, in the recorded order; repeat for several."),
]
Init = Annotated[str | None, typer.Option(metavar="FILE", help="Where the picture that it started from is now.")]
Mask = Annotated[str | None, typer.Option(metavar="FILE", help="Where its mask is now.")]
Vae = Annotated[str | None, typer.Option(metavar="FILE", help="Where the recorded VAE is now.")]
Out = Annotated[
    str | None,
    typer.Option("-o", "--out", metavar="FILE", help="Also write the image made again; - for standard output."),
]
Lora = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="Where its LoRA is now; once for each, in the recorded order.")
]
Embedding = Annotated[list[str] | None, typer.Option(metavar="FILE", help="The same for its learned words.")]
Size = Annotated[str | None, typer.Option(help="Make it in another size: needs -o, and compares nothing.")]
Seed = Annotated[int | None, typer.Option(help="Make it with another seed: needs -o, and compares nothing.")]
Hires = Annotated[str | None, typer.Option(metavar="2x", help="Make it so many times as large: needs -o.")]
Steps = Annotated[int | None, typer.Option(help="Make it in this many steps: needs -o, and compares nothing.")]


def replay(
    image: Image,
    cond: Cond = None,
    out: Out = None,
    size: Size = None,
    seed: Seed = None,
    steps: Steps = None,
    hires: Hires = None,
    init: Init = None,
    mask: Mask = None,
    lora: Lora = None,
    embedding: Embedding = None,
    vae: Vae = None,
    device: Device = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
) -> None:
    silence_libraries()
    from controlnet.model.work.replay import job_of, read_recorded, remake

    before = read_recorded(image)
    job = job_of(before, cond, init, mask, lora, embedding)
    job = replace(job, vae=vae or job.vae)

    # What is to be made: the recorded job, or a changed one, which needs -o and is not compared.
    given: dict[str, Any] = {"size": size, "seed": seed, "steps": steps, "hires": hires}
    changed = {name: OPTIONS[name].read(name, value) for name, value in given.items() if value is not None}
    if changed and out is None:
        flags = " ".join(f"--{name}" for name in changed)
        raise UsageError(
            f"{flags} makes another image: where to?", f"controlnet replay {image} {flags} ... -o again.png"
        )
    path = _place(image, out, changed, as_json, overwrite)
    after = remake(before, replace(job, **changed), device, offline, say)
    if path is not None:
        write_file(path, after.encoded(path.suffix.lower()))
    elif out is not None:
        sys.stdout.buffer.write(after.png())
        return
    if changed:
        tell({"output": str(path), **after.record}, as_json)
    else:
        _tell_difference(before, after, as_json)


def _place(image: Path, out: str | None, changed: dict[str, Any], as_json: bool, overwrite: bool) -> Path | None:
    """Where the image made again goes; None for nowhere, or for standard output."""
    if out is None:
        return None
    path = output_path(out, Path(image.name), several=False, endings=IMAGES)
    if path is None:
        if not changed or as_json:
            raise UsageError("the image and what is said of it would both go to standard output", "-o again.png")
        return None
    if exists(path) and not overwrite:
        raise OutputError(f"{path}: exists already", "add --overwrite to replace it, or another -o")
    keeps(path, overwrite, skip_existing=False)
    return path


def _tell_difference(before: Any, after: Any, as_json: bool) -> None:
    """How far off the image made again is, and what may be the reason."""
    from controlnet.model.work.replay import changes, compare

    if after.pixels.shape != before.pixels.shape:
        raise InputError(
            f"{before.path}: {before.pixels.shape[1]}x{before.pixels.shape[0]} pixels, but its record says"
            f" {list(after.record['size'])}",
            "the image was resized after it was made: replay the one that generate wrote",
        )
    off, causes = compare(before, after), sorted(changes(before.record, after.record))
    same = off.largest == 0
    if as_json:
        told = {"largest": off.largest, "mean": round(off.mean, 4), "changed": round(off.changed, 4)}
        print(dumps({"image": str(before.path), "identical": same, **told, "differs": causes}))
    elif same:
        print("identical")
    else:
        print(
            f"differs: by up to {off.largest} of 255 levels, {off.mean:.3f} in the mean, "
            f"in {off.changed:.1%} of the pixels"
        )
    for cause in causes if not as_json else ():
        say(f"not as recorded: {cause}")
    if not same:
        raise typer.Exit(Exit.DIFFERENT)
