"""Images made and written: here, or by a crew of processes on this machine or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.model.work.batch import Wanted
from controlnet.model.work.cluster import share
from controlnet.model.work.crew import Crew, killed_twice, one_part
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.tars import write_tar

Failed = Callable[[str, ControlNetError], None]
"""Told the name of a job and why it failed."""


@dataclass(frozen=True)
class Task:
    """Images for one process: those that are made together, or those of a tar file."""

    wanted: list[Wanted]
    tar: Path | None = None
    """Where all of them go, instead of to their paths."""


@dataclass(frozen=True)
class Setup:
    """How images are made: the arguments of `Studio`, and what becomes of each image."""

    device: str | None = None
    dtype: str | None = None
    offline: bool = False
    strict: bool = False
    low_memory: bool = False
    engine: str | None = None
    keep_best: int | None = None
    rows: bool = False
    """Whether `Made.row` is wanted."""


@dataclass(frozen=True)
class Made:
    """An image that was made and, if it has a path, written."""

    wanted: Wanted
    output: str | None
    """Its file, or its tar file and its name in it; None for standard output."""
    record: dict[str, Any]
    png: bytes | None
    """The file, for standard output."""
    row: list[tuple[np.ndarray, str]] = field(default_factory=list)
    """For a preview: the conditions and the image, each with a short text."""


def studio_of(setup: Setup, say: Callable[[str], None] = lambda text: None) -> Any:
    from controlnet.model.work.studio import Studio  # here: it imports torch

    return Studio(
        setup.device, setup.dtype, setup.offline, setup.strict, setup.low_memory, setup.engine, say
    )  # fmt: skip


def make_here(
    tasks: list[Task],
    setup: Setup,
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
    studio: Any = None,
) -> Iterator[Made]:
    """Do tasks in this process. `on_step` is called with the number of images made, fractions included."""
    studio = studio or studio_of(setup, say)
    if any(task.tar for task in tasks):
        done = 0
        for task in tasks:
            yield from _make_tar(task, setup, studio, failed, say, lambda images, done=done: on_step(done + images))
            done += len(task.wanted)
        return
    for image, row in _images([one for task in tasks for one in task.wanted], setup, studio, failed, say, on_step):
        path = image.wanted.path
        if path is not None:
            write_file(path, image.encoded(path.suffix.lower()))
        yield Made(image.wanted, path and str(path), image.record, image.png() if path is None else None, row)


def _images(
    wanted: list[Wanted], setup: Setup, studio: Any, failed: Failed, say, on_step
) -> Iterator[tuple[Any, list]]:
    """Each image that is not there yet, and its row of a preview."""
    from controlnet.model.work.best import make_best

    for image in make_best(wanted, setup.keep_best, studio, failed, say, on_step):
        if image.wanted.there:
            continue
        row = []
        if setup.rows:
            _, conditions = studio.conditions(image.wanted.job)
            row = [(condition.rgb, condition.kind) for condition in conditions]
            row.append((image.pixels, f"seed {image.wanted.seed}: {image.wanted.job.prompt}"))
        yield image, row


def _make_tar(task: Task, setup: Setup, studio: Any, failed: Failed, say, on_step) -> list[Made]:
    """The images of a task in one tar file as WebDataset reads it, whole or not there: NAME.png, its record NAME.json,
    and its conditions as they were read, NAME.0.KIND.png."""
    assert task.tar is not None
    images = _images(task.wanted, setup, studio, failed, say, on_step)
    first = next(images, None)
    if first is None:  # all of them failed
        return []
    made: list[Made] = []
    write_tar(task.tar, _files_of(task.tar, chain([first], images), studio, made))
    return made


def _files_of(path: Path, images: Iterable[tuple[Any, list]], studio: Any, made: list[Made]) -> Iterator:
    """(name, bytes) of the files in a tar file; the images are added to `made`."""
    for image, row in images:
        name = f"{image.wanted.number:08d}-{image.wanted.seed}-{image.wanted.job.stem}".replace(".", "_")
        _, conditions = studio.conditions(image.wanted.job)
        yield f"{name}.png", image.png()
        yield f"{name}.json", dumps(image.record).encode()
        for i, one in enumerate(conditions):
            yield f"{name}.{i}.{one.kind}.png", one.png()
        made.append(Made(image.wanted, f"{path}#{name}", image.record, None, row))


def make(
    tasks: list[Task],
    setup: Setup,
    devices: list[str | None],
    ray: str | None,
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
) -> Iterator[Made]:
    """Do tasks on the Ray cluster at this address, else in a process for each device, else here."""
    if ray is None and not devices:
        yield from make_here(tasks, setup, failed, say, on_step)
        return
    apart = _images_of if setup.keep_best is None else one_part  # the best are chosen among all of a job
    crew = Crew(partial(make_worker, setup), _died, apart, Outcome.joined)
    outcomes = share(tasks, crew, devices, ray)
    counts = (len(task.wanted) for task in tasks)
    yield from told(zip(counts, outcomes, strict=True), failed, say, on_step)


def told(
    outcomes: Iterable[tuple[int, Outcome]],
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None],
) -> Iterator[Made]:
    """The images of pairs (number of images asked for, outcome). Failures and talk are reported, each line once."""
    seen: set[str] = set()
    done = 0
    for count, outcome in outcomes:
        for line in (line for line in outcome.said if line not in seen):
            seen.add(line)
            say(line)
        for name, error in outcome.failed:
            failed(name, error)
        yield from outcome.made
        done += count
        on_step(done)


@dataclass
class Outcome:
    """What became of a task."""

    made: list[Made] = field(default_factory=list)
    failed: list[tuple[str, ControlNetError]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @staticmethod
    def joined(parts: list[Outcome]) -> Outcome:
        return Outcome(*([x for part in parts for x in getattr(part, name)] for name in ("made", "failed", "said")))


def make_worker(setup: Setup, device: str | None) -> Callable[[Task], Outcome]:
    """The worker of a process. Its studio is made with the first task, so that what is wrong with a device is an error
    of that task."""
    setup = replace(setup, device=device or setup.device)
    studio: Any = None
    said: list[str] = []

    def work(task: Task) -> Outcome:
        nonlocal studio
        said.clear()
        outcome = Outcome()

        def failed(name: str, error: ControlNetError) -> None:
            outcome.failed.append((name, error))

        try:
            studio = studio or studio_of(setup, said.append)
            outcome.made += make_here([task], setup, failed, said.append, studio=studio)
        except ControlNetError as error:  # such as a full disk, halfway
            known = {name for name, _ in outcome.failed}
            for name in _names_of(task, outcome.made):
                if name not in known:
                    failed(name, error)
        outcome.said = list(said)
        return outcome

    return work


def _names_of(task: Task, made: list[Made]) -> list[str]:
    """The jobs of a task of which an image was not made."""
    done = {id(one.wanted) for one in made}
    return list(dict.fromkeys(one.name for one in task.wanted if id(one) not in done and not one.there))


def _images_of(task: Task) -> list[Task]:
    """A task for each image, if they are files of their own."""
    return [Task([one]) for one in task.wanted] if task.tar is None else [task]


def _died(task: Task) -> Outcome:
    names = _names_of(task, []) if task.wanted[0].name else [str(task.tar or task.wanted[0].path)]
    return Outcome(failed=[(name, killed_twice()) for name in names])
