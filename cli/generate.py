"""`controlnet generate --cond MAP --prompt TEXT`: condition maps and prompts become images.

Everything that can be wrong without a model is checked before one is loaded.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from controlnet.cli.bars import images_bar
from controlnet.cli.options import (
    Device,
    Devices,
    Dtype,
    EngineFlag,
    Json,
    Offline,
    Overwrite,
    Processes,
    Quiet,
    RayAddress,
    ShardFlag,
    SkipExisting,
    Strict,
    default_base,
    flags_of_job,
    parameter,
    say,
    say_error,
    tell,
    typed,
)
from controlnet.model.work.batch import Wanted, in_tars, in_units, read_jobs_file, spread, targets
from controlnet.model.work.crew import places
from controlnet.model.work.jobs import Job, make_job
from controlnet.model.work.machine import silence_libraries
from controlnet.model.work.named import check_names
from controlnet.model.work.outputs import IMAGES, check_existing, check_png, exists_already, is_folder, keeps
from controlnet.preprocessors.errors import ControlNetError, Exit, UsageError
from controlnet.preprocessors.files import is_file, read_text
from controlnet.preprocessors.remote import place
from controlnet.preprocessors.shards import WHOLE, Shard, claim, parse_shard

if TYPE_CHECKING:
    from controlnet.model.work.pool import Made

FILES = ("init", "mask", "vae", "base")
"""Flags that name a file; in a table an empty cell means none, on the command line it is a mistake."""
TEXTS = ("prompt", "negative", "prompt2", "negative2")
SHOWN = 24
"""Images on a preview."""

LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Keep each network on the device only while it works (on a CPU its weights in a file), sample one image "
        "at a time, where it helps one half of the guidance at a time, decode in tiles. Slower.",
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
TarSize = Annotated[
    int | None, typer.Option(metavar="N", help="Results in tar files of N images (WebDataset) with maps and records.")
]
Jobs = Annotated[
    str | None,
    typer.Option(
        "--jobs",
        metavar="FILE",
        help="JSON Lines, CSV, Parquet or tar files, a job each; keys are names of flags. Other flags are defaults.",
    ),
]
PARAMETERS = [
    *flags_of_job(),
    parameter("jobs", Jobs, None), parameter("device", Device, None), parameter("dtype", Dtype, None),
    parameter("as_json", Json, False), parameter("overwrite", Overwrite, False),
    parameter("skip_existing", SkipExisting, False), parameter("offline", Offline, False),
    parameter("strict", Strict, False), parameter("quiet", Quiet, False), parameter("low_memory", LowMemory, False),
    parameter("engine", EngineFlag, None),
    parameter("keep_best", KeepBest, None), parameter("preview", Preview, None), parameter("shard", ShardFlag, None),
    parameter("processes", Processes, None), parameter("devices", Devices, None),
    parameter("ray", RayAddress, None), parameter("tar", TarSize, None),
]  # fmt: skip


class _Failures:
    """Reports each job that fails, and remembers its name. A job that stands alone has no name; it ends the command
    instead."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.hints: set[str] = set()

    def __call__(self, name: str, error: ControlNetError) -> None:
        if not name:
            raise error
        self.names.add(name)
        say_error(f"{name}: ", error, self.hints)

    def end(self, jobs: list) -> None:
        """Exit with code PARTIAL if any job has failed."""
        if not self.names:
            return
        count = len(self.names)
        others = "the others are done" if {name for name, _ in jobs} - self.names else "none is done"
        say(f"{count} job{'s' * (count > 1)} failed; {others}")
        raise typer.Exit(Exit.PARTIAL)


def _generate(
    *,
    jobs,
    device,
    dtype,
    as_json,
    overwrite,
    skip_existing,
    offline,
    strict,
    quiet,
    low_memory,
    engine,
    keep_best,
    preview,
    shard,
    processes,
    devices,
    ray,
    tar,
    **job,
) -> None:
    defaults = job | {name: _from_file(f"--{name}", job[name]) for name in TEXTS}
    for name in FILES:
        if defaults[name] == "":
            raise UsageError(f'--{name} "": the name of a file is empty', "a variable of the shell that is not set?")
    defaults["base"] = defaults["base"] or default_base()
    if preview is not None:
        check_png("--preview", preview)
        keeps(preview, overwrite, skip_existing=False)
    check_existing(overwrite, skip_existing)
    used = places(processes, devices, ray)
    failed = _Failures()
    part, sharded = parse_shard(shard), shard is not None
    _claim(part, jobs, defaults, [keep_best, tar, dtype, low_memory, engine])
    todo = _jobs(jobs, defaults, failed, part)
    if keep_best is not None:
        _check_keep_best(keep_best, [job for _, job in todo], skip_existing)

    groups = _groups(todo, part, sharded, failed, overwrite, skip_existing, keep_best, tar, defaults["out"], as_json)
    if sharded and not groups:
        say(f"{part.name}: nothing to make here")
    if as_json and any(one.path is None for group in groups for one in group):
        raise UsageError("--json and an image would both go to standard output", "-o image.png --json")
    rows: list[list] = []
    if groups:
        # Not before: what is wrong with a job is told in a moment, and this imports torch.
        silence_libraries()
        from controlnet.model.work import pool, sheets

        setup = pool.Setup(device, dtype, offline, strict, low_memory, engine, keep_best, rows=preview is not None)
        tasks = [pool.Task(group, group[0].path if tar is not None else None) for group in groups]
        with images_bar(sum(map(len, groups)), quiet) as on_step:
            for image in pool.make(tasks, setup, used, ray, failed, say, on_step):
                _tell(image, as_json)
                if len(rows) < SHOWN:
                    rows.append(image.row)
        if preview is not None and rows:
            sheets.write_images(preview, rows)
            say(f"look at {preview}")
    failed.end(todo)


def _claim(part: Shard, jobs: str | None, defaults: dict, others: list) -> None:
    """Record in a folder of results what is made there, so that no shard of other settings writes into it."""
    if part == WHOLE or not is_folder(defaults["out"] or "out/", IMAGES):
        return
    lines = [given if isinstance(given, dict) else str(given) for _, given in read_jobs_file(jobs)] if jobs else []
    settings = {name: value for name, value in defaults.items() if name != "out"}
    claim(place(defaults["out"] or "out"), part, [settings, lines, *others])


generate = typed(_generate, PARAMETERS)


def _from_file(flag: str, text: str | None) -> str | None:
    """A prompt as given, or the text of the file that @FILE names."""
    if text is None or not text.startswith("@"):
        return text
    if not is_file(text[1:]):
        raise UsageError(f"{flag} {text}: no such file", f'{flag} "..." for the words themselves')
    return " ".join(read_text(Path(text[1:])).split())


def _check_keep_best(count: int, jobs: list[Job], skip_existing: bool) -> None:
    if skip_existing:
        raise UsageError("--keep-best writes other images each time, and --skip-existing leaves some", "--overwrite")
    for job in jobs:
        if not 1 <= count <= job.num:
            raise UsageError(f"--keep-best {count} of {job.num} images: expected 1 to --num", "--num 8 --keep-best 1")
        if not job.cond:
            raise UsageError("--keep-best: the job has no condition to keep to", "--cond map.canny.png")


def _jobs(path: str | None, defaults: dict[str, Any], failed: _Failures, part: Shard) -> list[tuple[str, Job]]:
    """(name, Job) for all jobs that are asked for. A single job that fails ends the command; its name is empty. A bad
    line is told by one shard."""
    if path is None:
        job = make_job({}, defaults)
        check_names(job)
        alone = spread(job)
        return [(job.shown or "" if len(alone) > 1 else "", job) for job in alone]
    jobs: list[tuple[str, Job]] = []
    for name, given in read_jobs_file(path):
        try:
            if isinstance(given, UsageError):
                raise given
            job = make_job(given, defaults)
            check_names(job)
            jobs += [(name, one) for one in spread(job)]
        except ControlNetError as error:
            if part.holds(name):
                failed(name, error)
    return jobs


def _tell(image: Made, as_json: bool) -> None:
    if image.png is not None:
        sys.stdout.buffer.write(image.png)
        sys.stdout.flush()
    else:
        tell({"output": image.output, **image.record}, as_json)


def _groups(
    jobs: list[tuple[str, Job]],
    part: Shard,
    sharded: bool,
    failed: _Failures,
    overwrite: bool,
    skip_existing: bool,
    keep_best: int | None,
    tar: int | None,
    out: str | None,
    as_json: bool,
) -> list[list[Wanted]]:
    """The images that are to be made here, in the groups that are made together, or go into a tar file. Those that are
    there already are told, or are errors."""
    asked = targets(jobs, overwrite, skip_existing, failed, keep_best, sharded, tar is not None, out)
    groups = in_units(asked, keep_best is not None)
    if tar is not None:
        groups = _in_tars(groups, tar, out, overwrite, skip_existing or sharded)
    groups = [group for group in groups if part.holds(group[0].content)]
    for one in (one for group in groups for one in group if one.there):
        if skip_existing:
            tell({"output": str(one.path), "seed": one.seed, "skipped": True}, as_json)
        else:  # in a shard it is known only now that it is one of ours
            failed(one.name or part.name, exists_already(one.path))
    return [group for group in groups if not all(one.there for one in group)]


def _in_tars(groups: list, size: int, out: str | None, overwrite: bool, skip_existing: bool) -> list:
    """Groups of the size of a tar file, each image with its tar file as its path."""
    if size < 1:
        raise UsageError(f"--tar {size}: expected 1 or more images a file", "--tar 1000")
    if out is not None and not is_folder(out, IMAGES):
        raise UsageError(f"--tar {size} -o {out}: expected a folder", "-o set/")
    tars = []
    for number, group in enumerate(in_tars(groups, size)):
        path = place(out or "out") / f"{number:06d}.tar"
        there = keeps(path, overwrite, skip_existing)
        tars.append([replace(one, path=path, there=there) for one in group])
    return tars
