"""Images made and written: here, or by several processes on one machine, each with a device and models of its own.

Processes take whole units (`batch.in_units`), so an image is the same whoever makes it; results come in order. A unit
whose process dies is tried once more, its images one by one, and then reported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from controlnet.model.work.batch import Wanted
from controlnet.preprocessors.errors import ControlNetError, Exit, ModelError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.workers import workers

Failed = Callable[[str, ControlNetError], None]
"""Told the name of a job and why it failed."""
AHEAD = 2
"""Units that wait for each process, so that none is idle and memory does not grow with their number."""


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
    record: dict[str, Any]
    png: bytes | None
    """The file, if it has no path."""
    row: list[tuple[np.ndarray, str]] = field(default_factory=list)
    """For a preview: the conditions and the image, each with a short text."""


def make_here(
    units: list[list[Wanted]],
    setup: Setup,
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
    studio: Any = None,
) -> Iterator[Made]:
    """Make the images of units in this process. `on_step` is called with the number of images made, fractions
    included."""
    from controlnet.model.work.best import make_best
    from controlnet.model.work.studio import Studio

    studio = studio or Studio(setup.device, setup.dtype, setup.offline, setup.strict, setup.low_memory, say)
    wanted = [one for unit in units for one in unit]
    for image in make_best(wanted, setup.keep_best, studio, failed, say, on_step):
        if image.wanted.there:
            continue
        png = image.png()
        if image.wanted.path is not None:
            write_file(image.wanted.path, png)
        row = []
        if setup.rows:
            _, conditions = studio.conditions(image.wanted.job)
            row = [(condition.rgb, condition.kind) for condition in conditions]
            row.append((image.pixels, f"seed {image.wanted.seed}: {image.wanted.job.prompt}"))
        yield Made(image.wanted, image.record, png if image.wanted.path is None else None, row)


def make_in_processes(
    units: list[list[Wanted]],
    setup: Setup,
    devices: list[str | None],
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
) -> Iterator[Made]:
    """The same in a process for each device; None is the best one there is, in turn if there are several. Each line of
    talk is said once."""
    told: set[str] = set()
    done = 0
    for unit, outcome in _in_order(units, setup, devices):
        for line in (line for line in outcome.said if line not in told):
            told.add(line)
            say(line)
        for name, error in outcome.failed:
            failed(name, error)
        yield from outcome.made
        done += len(unit)
        on_step(done)


@dataclass
class _Outcome:
    """What became of a unit."""

    made: list[Made] = field(default_factory=list)
    failed: list[tuple[str, ControlNetError]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def _in_order(
    units: list[list[Wanted]], setup: Setup, devices: list[str | None]
) -> Iterator[tuple[list[Wanted], _Outcome]]:
    waiting: dict[int, Future] = {}
    suspects: set[int] = set()  # units that were at work when a process died
    begun = given = 0
    pool = _pool(setup, devices)
    try:
        while given < len(units):
            while begun < len(units) and len(waiting) < AHEAD * len(devices) and not suspects:
                waiting[begun] = pool.submit(_make, units[begun])
                begun += 1
            try:
                outcome = waiting[given].result() if given not in suspects else _alone(pool, units[given])
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(setup, devices)
                if given in suspects:
                    outcome = _Outcome(failed=[_died(units[given])])
                else:
                    suspects = {i for i, future in waiting.items() if not future.done() or future.exception()}
                    continue
            suspects.discard(given)
            waiting.pop(given, None)
            yield units[given], outcome
            given += 1
    except BaseException:  # Ctrl-C: files are whole or not there, so nobody is waited for
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _alone(pool, unit: list[Wanted]) -> _Outcome:
    """A unit once more, its images one by one: less memory. Raises BrokenProcessPool."""
    whole = _Outcome()
    for one in unit:
        part: _Outcome = pool.submit(_make, [one]).result()
        whole.made += part.made
        whole.failed += part.failed
        whole.said += part.said
    return whole


def _died(unit: list[Wanted]) -> tuple[str, ControlNetError]:
    error = ModelError("the process that made it was killed twice, as the system does when memory runs out",
                       "--low-memory, fewer --processes, or a smaller --size")  # fmt: skip
    return unit[0].name or str(unit[0].path), error


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
    global _studio, _setup
    import torch
    from controlnet.model.work.studio import Studio

    signal.signal(signal.SIGINT, lambda number, frame: os._exit(Exit.INTERRUPTED))
    number, device = queue.get()
    if device is None and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    _setup = setup
    _studio = Studio(device or setup.device, setup.dtype, setup.offline, setup.strict, setup.low_memory)


def _make(unit: list[Wanted]) -> _Outcome:
    outcome = _Outcome()
    _studio.say = outcome.said.append
    noted = lambda name, error: outcome.failed.append((name, error))  # noqa: E731
    try:
        outcome.made += make_here([unit], _setup, noted, outcome.said.append, studio=_studio)
    except ControlNetError as error:
        outcome.failed.append((unit[0].name, error))
    return outcome
