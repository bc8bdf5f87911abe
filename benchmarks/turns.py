"""What takes long to prepare, such as compiled networks, measured side by side in little time: each is prepared in a
process of its own, all at once; then one after another runs while the others wait."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch


@dataclass
class Prepared:
    """What a process is to measure. `run(n)` does n evaluations or steps."""

    run: Callable[[int], torch.Tensor | None]
    count: int
    plain: Callable[[int], torch.Tensor] | None = None
    """The same without compiling: how far `run` is from it is told."""


@dataclass
class Row:
    """What was found. Seconds of an evaluation, one for each round; `first` of the first `count` of them; `peak` of
    the memory in the rounds, GB; `off` of the same not compiled, in deviations of it."""

    first: float
    off: float | None
    result: torch.Tensor | None
    peak: float = 0.0
    seconds: list[float] = field(default_factory=list)


ROUND = 60.0
"""Seconds after which a round of a row counts as failed."""


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(
    prepare: Callable[..., Prepared], jobs: Sequence[tuple], seconds: float, rounds: int = 3
) -> dict[tuple, Row]:
    """The rows of those `jobs`, arguments of `prepare`, that were ready within so many seconds; the others are named.
    `prepare` is a function of a module."""
    context, start = get_context("spawn"), time.monotonic()
    processes, waiting, rows, pipes = [], {}, {}, {}
    for job in jobs:
        here, there = context.Pipe()
        process = context.Process(target=_measure, args=(prepare, job, there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        waiting[job] = here
    while waiting and time.monotonic() - start < seconds:
        for job, pipe in [(job, pipe) for job, pipe in waiting.items() if pipe.poll(0.05)]:
            del waiting[job]
            if (row := _received(pipe)) is not None:
                rows[job], pipes[job] = row, pipe
            else:
                print(f"{job}: failed", flush=True)
    for job, process in zip(jobs, processes, strict=True):
        if job in waiting:
            print(f"{job}: not ready in {seconds:.0f} s", flush=True)
            _end(process)
    for _ in range(rounds):
        for job, pipe in list(pipes.items()):
            with suppress(OSError):  # it is not there any more, as is found next
                pipe.send("go")
            if (found := _received(pipe)) is not None:
                took, rows[job].peak = found
                rows[job].seconds.append(took)
                print(f"{job}: {1e3 * took:.2f} ms", flush=True)
            else:  # the others are measured all the same
                print(f"{job}: failed", flush=True)
                _end(processes[jobs.index(job)])
                del pipes[job], rows[job]
    for process in processes:
        _end(process)
    return rows


def _end(process: Any) -> None:
    """Kill it, and wait until what it held is free."""
    process.kill()
    process.join()


def _received(pipe: Connection) -> Any:
    """What a process sends next; None where it sends nothing any more. It has printed why, or hangs."""
    try:
        return pipe.recv() if pipe.poll(ROUND) else None
    except (EOFError, OSError):
        return None


def _measure(prepare: Callable[..., Prepared], job: tuple, pipe: Any) -> None:
    """Prepare a job, say so, and do it whenever told to."""
    try:
        made = prepare(*job)
        truth = made.plain(made.count).float() if made.plain else None
        start = time.perf_counter()
        result = made.run(made.count)
        wait()
        first = time.perf_counter() - start
        result = None if result is None else result.float()
        off = None if truth is None or result is None else float((result - truth).abs().max() / truth.std())
        pipe.send(Row(first, off, None if result is None else result.cpu()))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        while pipe.recv() == "go":
            start = time.perf_counter()
            made.run(made.count)
            wait()
            peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
            pipe.send(((time.perf_counter() - start) / made.count, peak))
    except Exception:
        traceback.print_exc()
