"""`controlnet replay IMAGE`: make an image again from its PNG text; say how far off it is, and what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.options import Device, Json, Offline, Overwrite, say, tell
from controlnet.model.work.jobs import OPTIONS
from controlnet.model.work.outputs import check_png, keeps
from controlnet.preprocessors.errors import Exit, InputError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import dumps

Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG that `generate` made.")]
Cond = Annotated[
    list[str] | None,
    typer.Option("--cond", metavar="PATH", help="Where a condition is now, in the recorded order; repeat for several."),
]
Vae = Annotated[str | None, typer.Option(metavar="FILE", help="Where the recorded VAE is now.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Also write the image made again.")]
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
    vae: Vae = None,
    device: Device = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
) -> None:
    from controlnet.model.work.replay import changes, compare, job_of, read_recorded, remake

    before = read_recorded(image)
    job = job_of(before, cond)
    job = replace(job, vae=vae or job.vae)

    # What is to be made: the recorded job, or a changed one, which needs -o and is not compared.
    given: dict[str, Any] = {"size": size, "seed": seed, "steps": steps, "hires": hires}
    changed = {name: OPTIONS[name].read(name, value) for name, value in given.items() if value is not None}
    if changed and out is None:
        flags = " ".join(f"--{name}" for name in changed)
        raise UsageError(
            f"{flags} makes another image: where to?", f"controlnet replay {image} {flags} ... -o again.png"
        )
    if out is not None:
        check_png("-o", out)
        keeps(out, overwrite, skip_existing=False)
    after = remake(before, replace(job, **changed), device, offline, say)
    if out is not None:
        write_file(out, after.png())
    if changed:
        tell({"output": str(out), **after.record}, as_json)
        return

    # How far off it is, and what may be the reason.
    if after.pixels.shape != before.pixels.shape:
        raise InputError(
            f"{image}: {before.pixels.shape[1]}x{before.pixels.shape[0]} pixels, but its record says"
            f" {list(after.record['size'])}",
            "the image was resized after it was made: replay the one that generate wrote",
        )
    off, causes = compare(before.pixels, after.pixels), sorted(changes(before.record, after.record))
    same = off.largest == 0
    if as_json:
        told = {"largest": off.largest, "mean": round(off.mean, 4), "changed": round(off.changed, 4)}
        print(dumps({"image": str(image), "identical": same, **told, "differs": causes}))
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
