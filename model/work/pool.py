"""Images made and written: here, or by several processes on one machine, each with a device and models of its own.

Processes take whole tasks, so an image is the same whoever makes it; results come in order. A task whose process dies
is tried once more, its images one by one, and then reported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.model.work.batch import Wanted
from controlnet.preprocessors.errors import ControlNetError, Exit, ModelError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.tars import write_tar
from controlnet.preprocessors.workers import workers

Failed = Callable[[str, ControlNetError], None]
"""Told the name of a job and why it failed."""
AHEAD = 2
"""Tasks that wait for each process, so that none is idle and memory does not grow with their number."""


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


def make_here(
    tasks: list[Task],
    setup: Setup,
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
    studio: Any = None,
) -> Iterator[Made]:
    """Do tasks in this process. `on_step` is called with the number of images made, fractions included."""
    from controlnet.model.work.studio import Studio

    studio = studio or Studio(setup.device, setup.dtype, setup.offline, setup.strict, setup.low_memory, say)
    if any(task.tar for task in tasks):
        done = 0
        for task in tasks:
            yield from _make_tar(task, setup, studio, failed, say, lambda images, done=done: on_step(done + images))
            done += len(task.wanted)
        return
    for image, row in _images([one for task in tasks for one in task.wanted], setup, studio, failed, say, on_step):
        path = image.wanted.path
        if path is not None:
            write_file(path, image.png())
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


def make_in_processes(
    tasks: list[Task],
    setup: Setup,
    devices: list[str | None],
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
) -> Iterator[Made]:
    """The same in a process for each device; None is the best one there is, in turn if there are several."""
    yield from told(_in_order(tasks, setup, devices), failed, say, on_step)


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


def _in_order(tasks: list[Task], setup: Setup, devices: list[str | None]) -> Iterator[tuple[int, Outcome]]:
    waiting: dict[int, Future] = {}
    suspects: set[int] = set()  # tasks that were at work when a process died
    begun = given = 0
    pool = _pool(setup, devices)
    try:
        while given < len(tasks):
            try:
                while begun < len(tasks) and len(waiting) < AHEAD * len(devices) and not suspects:
                    waiting[begun] = pool.submit(do, tasks[begun])
                    begun += 1
                outcome = waiting[given].result() if given not in suspects else _alone(pool, tasks[given])
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(setup, devices)
                if given in suspects:
                    outcome = Outcome(failed=[_died(tasks[given])])
                else:
                    suspects = {i for i, future in waiting.items() if not future.done() or future.exception()}
                    continue
            suspects.discard(given)
            waiting.pop(given, None)
            yield len(tasks[given].wanted), outcome
            given += 1
    except BaseException:  # Ctrl-C: files are whole or not there, so nobody is waited for
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _alone(pool, task: Task) -> Outcome:
    """A task once more, its images one by one if they are files of their own: less memory. Raises BrokenProcessPool."""
    if task.tar is not None:
        return pool.submit(do, task).result()
    whole = Outcome()
    for one in task.wanted:
        part: Outcome = pool.submit(do, Task([one])).result()
        whole.made += part.made
        whole.failed += part.failed
        whole.said += part.said
    return whole


def _died(task: Task) -> tuple[str, ControlNetError]:
    error = ModelError(
        "the process that made it was killed twice, as the system does when memory runs out",
        "--low-memory, fewer --processes, or a smaller --size",
    )
    return task.wanted[0].name or str(task.tar or task.wanted[0].path), error


_studio: Any = None
_setup = Setup()


def _pool(setup: Setup, devices: list[str | None]):
    queue = get_context("spawn").Queue()
    for number, device in enumerate(devices):
        queue.put((number, device))
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // len(devices)))
    return workers(len(devices), threads, _begin, (queue, setup))


def _begin(queue, setup: Setup) -> None:
    """In a process: take a device from the queue, and load nothing yet."""
    import torch

    signal.signal(signal.SIGINT, lambda number, frame: os._exit(Exit.INTERRUPTED))
    number, device = queue.get()
    if device is None and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    begin(replace(setup, device=device or setup.device))


def begin(setup: Setup) -> None:
    """Make this process one that can `do` tasks. Its studio is made with the first one, so that what is wrong with a
    device is an error of that task."""
    global _studio, _setup
    _studio, _setup = None, setup


def do(task: Task) -> Outcome:
    """Do a task in a process that has begun."""
    global _studio
    from controlnet.model.work.studio import Studio

    outcome = Outcome()

    def failed(name: str, error: ControlNetError) -> None:
        outcome.failed.append((name, error))

    try:
        _studio = _studio or Studio(_setup.device, _setup.dtype, _setup.offline, _setup.strict, _setup.low_memory)
        _studio.say = outcome.said.append
        outcome.made += make_here([task], _setup, failed, outcome.said.append, studio=_studio)
    except ControlNetError as error:
        failed(task.wanted[0].name, error)
    return outcome
