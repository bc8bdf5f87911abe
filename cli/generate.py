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
    check_png,
    default_base,
    keeps,
    say,
    tell,
)
from controlnet.preprocessors.errors import ControlNetError, Exit, UsageError
from typer.core import TyperCommand

HELP = "Make images from condition maps and a prompt."
SHOWN = 24
"""Images on a preview."""

Cond = Annotated[
    list[str] | None,
    typer.Option(
        "--cond",
        metavar="PATH[,key=value...]",
        help="A condition map, or a folder of maps; repeat for several. Keys: detect=KIND, kind, net, scale, start, "
        "end, weighting, region.",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What the image shows; @FILE reads it from a file.")]
Negative = Annotated[str, typer.Option(help="What it should not show; or @FILE.")]
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
Preview = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also make a contact sheet of the conditions and their images.")
]
Jobs = Annotated[
    Path | None,
    typer.Option(
        "--jobs", metavar="FILE", help="JSON Lines or CSV, a job each; keys are flags. Other flags are defaults."
    ),
]


LATER = {"--init": "a picture as a start", "--mask": "inpainting", "--lora": "LoRA", "--embedding": "textual inversion"}
"""Flags that people try, of what is not supported yet."""


class Command(TyperCommand):
    """Says of a flag that is not there yet what it would be, instead of one that is spelt alike."""

    def parse_args(self, ctx, args):
        for word in args:
            if (flag := word.split("=")[0]) in LATER:
                raise UsageError(f"{flag}: {LATER[flag]} is not supported yet", "controlnet generate --help")
        return super().parse_args(ctx, args)


class _Failures:
    """What failed, told as it fails; a job that stands alone, which has no name, ends the command instead."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, name: str, error: ControlNetError) -> None:
        if not name:
            raise error
        self.names.add(name)
        say(f"error: {name}: {error}")
        if error.hint:
            say(f"hint: {error.hint}")

    def end(self, jobs: list) -> None:
        """Exit as some of several jobs, or all, have failed."""
        if not self.names:
            return
        count = len(self.names)
        others = "the others are done" if {name for name, _ in jobs} - self.names else "none is done"
        say(f"{count} job{'s' * (count > 1)} failed; {others}")
        raise typer.Exit(Exit.PARTIAL)


def generate(
    cond: Cond = None, prompt: Prompt = "", negative: Negative = "", out: Out = None, num: Num = 1, steps: Steps = 20,
    guidance: Guidance = None, scheduler: SchedulerName = None, base: BaseName = None, size: Size = None,
    seed: Seed = None, mode: Mode = None, control_on: ControlOn = None, weighting: Weighting = None,
    jobs: Jobs = None, device: Device = None, dtype: Dtype = None, as_json: Json = False, overwrite: Overwrite = False,
    skip_existing: SkipExisting = False, offline: Offline = False, strict: Strict = False, quiet: Quiet = False,
    low_memory: LowMemory = False, keep_best: KeepBest = None, preview: Preview = None,
) -> None:  # fmt: skip
    from controlnet.cli.bars import images_bar
    from controlnet.cli.jobs import targets

    defaults = {
        "cond": cond, "prompt": _from_file("--prompt", prompt), "negative": _from_file("--negative", negative),
        "out": out, "num": num, "steps": steps, "base": base or default_base(), "guidance": guidance,
        "scheduler": scheduler, "size": size, "seed": seed, "mode": mode, "control_on": control_on,
        "weighting": weighting,
    }  # fmt: skip
    if preview is not None:
        check_png("--preview", preview)
        keeps(preview, overwrite, skip_existing=False)
    failed = _Failures()
    todo = _jobs(jobs, defaults, failed)
    if keep_best is not None:
        _check_keep_best(keep_best, [job for _, job in todo], skip_existing)
    wanted = targets(todo, overwrite, skip_existing, as_json, failed, keep_best)
    if as_json and any(one.path is None for one in wanted):
        raise UsageError("--json and an image would both go to standard output", "-o image.png --json")
    rows: list[list] = []
    if wanted:
        from controlnet.cli.images import Studio  # not before: what is wrong with a job is told in a moment

        studio = Studio(device, dtype, offline, strict, low_memory)
        if keep_best is not None:
            wanted = _scorable(wanted, studio, failed)
        with images_bar(len(wanted), quiet) as on_step:
            made_images = studio.make(wanted, failed, on_step)
            if keep_best is not None:
                made_images = _best(made_images, keep_best, studio, offline, failed)
            for one, png, made in made_images:
                _write(one.path, png, made, as_json)
                if preview is not None and len(rows) < SHOWN:
                    rows.append(_row(one, png, studio))
    if preview is not None and rows:
        _write_preview(preview, rows)
    failed.end(todo)


def _from_file(flag: str, text: str) -> str:
    """A prompt as given, or of the file that @FILE names."""
    if not text.startswith("@"):
        return text
    from controlnet.preprocessors.files import is_file, read_text

    if not is_file(text[1:]):
        raise UsageError(f"{flag} {text}: no such file", f'{flag} "..." for the words themselves')
    return " ".join(read_text(Path(text[1:])).split())


def _row(one, png: bytes, studio) -> list:
    """A row of the preview: the conditions of an image, and the image, each with a word on it."""
    from controlnet.preprocessors.images import read_image

    _, reads = studio.reads(one.job)
    image, _ = read_image(png, "the image")
    return [*((read.map, read.kind) for read in reads), (image, f"seed {one.seed}: {one.job.prompt}")]


def _write_preview(path: Path, rows: list) -> None:
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.images import png_bytes
    from controlnet.preprocessors.sheet import contact_sheet

    columns = max(map(len, rows))
    blank = 0 * rows[0][0][0] + 255
    cells = [cell for row in rows for cell in [(blank, "")] * (columns - len(row)) + row]
    write_file(path, png_bytes(contact_sheet(cells, columns if columns > 2 else 2 * columns, 256)))
    say(f"look at {path}")


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
            for flag, read in zip(job.cond, studio.reads(job)[1], strict=True):
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
        _, reads = studio.reads(one.job)
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
        kept = {one.seed for one, _, _ in chosen}
        told = [f"{one.seed}: {made['score']:.3f}{' *' * (one.seed in kept)}" for one, _, made in images]
        say(f"scores by seed, * is kept: {', '.join(told)}")
        yield from sorted(chosen, key=lambda image: image[0].seed)


def _jobs(path: Path | None, defaults: dict[str, Any], failed) -> list:
    """(name, Job) of all that is asked for; the name is empty for a job that stands alone, whose errors end it all."""
    from controlnet.cli.jobs import check_names, make_job, read_jobs_file, spread

    if path is None:
        job = make_job({}, defaults)
        check_names(job)
        alone = spread(job)
        return [(job.cond[0].path if len(alone) > 1 else "", job) for job in alone]
    jobs = []
    for name, given in read_jobs_file(path):
        try:
            if isinstance(given, UsageError):
                raise given
            job = make_job(given, defaults)
            check_names(job)
            jobs += [(name, one) for one in spread(job)]
        except ControlNetError as error:
            failed(name, error)
    return jobs


def _write(path: Path | None, png: bytes, made: dict, as_json: bool) -> None:
    from controlnet.preprocessors.files import write_file

    if path is None:
        sys.stdout.buffer.write(png)
        sys.stdout.flush()
    else:
        write_file(path, png)
        tell({"output": str(path), **made}, as_json)
