"""`controlnet generate --cond MAP --prompt TEXT`: condition maps and prompts become images.

Everything that can be wrong without a model is checked before one is loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.options import (
    BaseName,
    Device,
    Dtype,
    Json,
    Offline,
    Out,
    Overwrite,
    Quiet,
    SkipExisting,
    Strict,
    default_base,
    say,
    tell,
)
from controlnet.preprocessors.errors import ControlNetError, Exit, UsageError

HELP = "Make images from condition maps and a prompt."

Cond = Annotated[
    list[str] | None,
    typer.Option(
        "--cond",
        metavar="PATH[,key=value...]",
        help="A condition map, or a folder of maps; repeat for several. Keys: detect=KIND, kind, net, scale, start, "
        "end, weighting, region.",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What the image shows.")]
Negative = Annotated[str, typer.Option(help="What it should not show.")]
Num = Annotated[int, typer.Option("--num", "-n", help="How many images; image k uses seed + k.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale; 1 is none. (default: the base's)")
]
SchedulerName = Annotated[str | None, typer.Option("--scheduler", help="ddim, euler, unipc, ... (default: the base's)")]
Size = Annotated[
    str | None,
    typer.Option(
        help="Canvas, WIDTHxHEIGHT or one number. (default: the condition's aspect at the base's native size)"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image. (default: random, and told)")]


Mode = Annotated[
    str | None,
    typer.Option(
        help="balanced; prompt (deep connections count more); control (only beside the prompt, weighted by "
        "resolution); guess (the same, deep ones more: for empty prompts). (default: the base's)"
    ),
]
ControlOn = Annotated[
    str | None, typer.Option(help="Halves of the guidance: both, or cond. (default: the mode's, else the base's)")
]
Weighting = Annotated[
    str | None,
    typer.Option(help="Of the connections: uniform, resolution, soft, or 1/.5/... (default: the mode's)"),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Each network on the device only while it works, one image and one half of the guidance at a time, "
        "decoding in tiles. Slower.",
    ),
]
KeepBest = Annotated[
    int | None,
    typer.Option(
        "--keep-best", metavar="N", help="Write only the N of a job's images that keep best to their conditions."
    ),
]
Jobs = Annotated[
    Path | None,
    typer.Option(
        "--jobs", metavar="FILE", help="JSON Lines or CSV, a job each; keys are flags. Other flags are defaults."
    ),
]


def generate(
    cond: Cond = None, prompt: Prompt = "", negative: Negative = "", out: Out = None, num: Num = 1, steps: Steps = 20,
    guidance: Guidance = None, scheduler: SchedulerName = None, base: BaseName = None, size: Size = None,
    seed: Seed = None, mode: Mode = None, control_on: ControlOn = None, weighting: Weighting = None,
    jobs: Jobs = None, device: Device = None, dtype: Dtype = None, as_json: Json = False, overwrite: Overwrite = False,
    skip_existing: SkipExisting = False, offline: Offline = False, strict: Strict = False, quiet: Quiet = False,
    low_memory: LowMemory = False, keep_best: KeepBest = None,
) -> None:  # fmt: skip
    from controlnet.cli.bars import images_bar
    from controlnet.cli.images import Studio
    from controlnet.cli.jobs import targets

    defaults = {
        "cond": cond, "prompt": prompt, "negative": negative, "out": out, "num": num, "steps": steps,
        "base": base or default_base(), "guidance": guidance, "scheduler": scheduler, "size": size, "seed": seed,
        "mode": mode, "control_on": control_on, "weighting": weighting,
    }  # fmt: skip
    failures = 0

    def failed(name: str, error: ControlNetError) -> None:
        nonlocal failures
        if not name:
            raise error
        failures += 1
        say(f"error: {name}: {error}")
        if error.hint:
            say(f"hint: {error.hint}")

    todo = _jobs(jobs, defaults, failed)
    if keep_best is not None:
        _check_keep_best(keep_best, [job for _, job in todo], skip_existing)
    wanted = targets(todo, overwrite, skip_existing, as_json, failed)
    if wanted:
        studio = Studio(device, dtype, offline, strict, low_memory)
        if keep_best is not None:
            wanted = _scorable(wanted, studio, failed)
        with images_bar(len(wanted), quiet) as on_step:
            made_images = studio.make(wanted, failed, on_step)
            if keep_best is not None:
                made_images = _best(made_images, keep_best, studio, offline, failed)
            for one, png, made in made_images:
                _write(one.path, png, made, as_json)
    if failures:
        say(f"{failures} job{'s' * (failures > 1)} failed; the others are done")
        raise typer.Exit(Exit.PARTIAL)


def _check_keep_best(count: int, jobs: list, skip_existing: bool) -> None:
    if skip_existing:
        raise UsageError("--keep-best writes other images each time, and --skip-existing leaves some", "--overwrite")
    for job in jobs:
        if not 1 <= count <= job.num:
            raise UsageError(f"--keep-best {count} of {job.num} images: expected 1 to --num", "--num 8 --keep-best 1")
        if not job.cond:
            raise UsageError("--keep-best: the job has no condition to keep to", "--cond map.canny.png")


def _scorable(wanted: list, studio, failed) -> list:
    """The wanted images whose conditions an image can be held against; the others' jobs fail before they are made."""
    from controlnet.cli.score import Scorer

    bad: set[int] = set()
    for job, name in {id(one.job): (one.job, one.name) for one in wanted}.values():
        try:
            for flag in job.cond:
                read = studio.read(flag)
                Scorer.check(read.map, read.kind, read.made, flag.path)
        except ControlNetError as error:
            bad.add(id(job))
            failed(name, error)
    return [one for one in wanted if id(one.job) not in bad]


def _best(made_images, count: int, studio, offline: bool, failed):
    """Of each job's images the `count` whose conditions are found on them best, in the order of their seeds; the score
    is the mean over the conditions of the one that tells most of its kind."""
    from itertools import groupby

    from controlnet.cli.score import Scorer
    from controlnet.preprocessors.images import read_image

    scorer = Scorer(offline)

    def score(one, png: bytes) -> float:
        image, _ = read_image(png, "the image")
        reads = [studio.read(flag) for flag in one.job.cond]
        scores = [scorer.compare(image, read.map, read.kind, read.made, flag.path, "the image").main
                  for flag, read in zip(one.job.cond, reads, strict=True)]  # fmt: skip
        return sum(scores) / len(scores)

    for _, group in groupby(made_images, lambda made: id(made[0].job)):
        images = list(group)
        try:
            images = [(one, png, made | {"score": round(score(one, png), 4)}) for one, png, made in images]
        except ControlNetError as error:
            failed(images[0][0].name, error)
            continue
        chosen = sorted(images, key=lambda image: -image[2]["score"])[:count]
        yield from sorted(chosen, key=lambda image: image[0].seed)


def _jobs(path: Path | None, defaults: dict[str, Any], failed) -> list:
    """(name, Job) of all that is asked for; the name is empty for a job that stands alone, whose errors end it all."""
    from controlnet.cli.jobs import make_job, read_jobs_file, spread

    if path is None:
        alone = spread(make_job({}, defaults))
        return [(job.cond[0].path if len(alone) > 1 else "", job) for job in alone]
    jobs = []
    for name, given in read_jobs_file(path):
        try:
            if isinstance(given, UsageError):
                raise given
            jobs += [(name, job) for job in spread(make_job(given, defaults))]
        except ControlNetError as error:
            failed(name, error)
    return jobs


def _write(path: Path | None, png: bytes, made: dict, as_json: bool) -> None:
    from controlnet.preprocessors.images import write_file

    if path is None:
        sys.stdout.buffer.write(png)
        sys.stdout.flush()
    else:
        write_file(path, png)
        tell({"output": str(path), **made}, as_json)
