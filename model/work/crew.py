"""Work shared by several processes of this machine (here) or of a Ray cluster (cluster.py), with results in order.

Each process makes a worker of its own, with its models, and takes whole items, so a result is the same whoever makes
it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

from controlnet.preprocessors.errors import Exit, ModelError, UsageError
from controlnet.preprocessors.workers import workers

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2
"""Items that wait for each process, so that none is idle and memory does not grow with their number."""


def one_part(item: Any) -> list[Any]:
    return [item]


def the_only(results: list[Any]) -> Any:
    (result,) = results
    return result


@dataclass(frozen=True)
class Crew(Generic[Item, Result]):
    """What the processes do. An item whose process dies is tried once more, in parts if it has any, since they need
    less memory, and then reported."""

    make: Callable[[str | None], Callable[[Item], Result]]
    """Called in each process with the name of its device (None: the best there is); gives its worker. To be pickled."""
    died: Callable[[Item], Result]
    """What becomes of an item whose process died twice."""
    parts: Callable[[Item], list[Item]] = one_part
    join: Callable[[list[Result]], Result] = the_only
    """The result of an item from those of its parts."""
    on_devices: bool = True
    """Whether the workers compute on a device, of which each should get its own."""


def without_models(work: Callable[[Item], Result], died: Callable[[Item], Result]) -> Crew[Item, Result]:
    """A crew whose workers are all this function, which is to be pickled."""
    return Crew(partial(_given, work), died, on_devices=False)


def _given(work: Callable, device: str | None) -> Callable:
    return work


def killed_twice() -> ModelError:
    return ModelError(
        "the process that made it was killed twice, as the system does when memory runs out",
        "--low-memory, fewer --processes, or a smaller --size",
    )


def places(processes: int | None, devices: str | None, ray: str | None = None) -> list[str | None]:
    """A device for each process of `--processes` and `--devices`; None is for the process to choose. Empty: no process
    but this one. Raises UsageError for flags that contradict each other."""
    if ray is not None and (processes or devices):
        raise UsageError("--ray has processes of its own: without --processes and --devices", f"--ray {ray}")
    if devices is None:
        if processes is not None and processes < 1:
            raise UsageError(f"--processes {processes}: expected 1 or more", "--processes 2")
        return [None] * processes if processes and processes > 1 else []
    names: list[str | None] = [f"cuda:{name}" if name.isdecimal() else name for name in devices.split(",") if name]
    if not names or (processes is not None and processes != len(names)):
        raise UsageError(f"--devices {devices}: expected a device for each process", "--devices 0,1")
    return names


def in_order(items: list[Item], crew: Crew[Item, Result], devices: list[str | None]) -> Iterator[Result]:
    """The results of the items, made in a process for each device."""
    waiting: dict[int, Future] = {}
    suspects: set[int] = set()  # items that were at work when a process died
    begun = given = 0
    pool = _pool(crew, devices)
    try:
        while given < len(items):
            try:
                while begun < len(items) and len(waiting) < AHEAD * len(devices) and not suspects:
                    waiting[begun] = pool.submit(_do, items[begun])
                    begun += 1
                result = waiting[given].result() if given not in suspects else _alone(pool, crew, items[given])
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(crew, devices)
                if given in suspects:
                    result = crew.died(items[given])
                else:
                    suspects = {i for i, future in waiting.items() if not future.done() or future.exception()}
                    continue
            suspects.discard(given)
            waiting.pop(given, None)
            yield result
            given += 1
    except BaseException:  # Ctrl-C: files are whole or not there, so nobody is waited for
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _alone(pool: ProcessPoolExecutor, crew: Crew[Item, Result], item: Item) -> Result:
    """An item once more, its parts one by one. Raises BrokenProcessPool."""
    return crew.join([pool.submit(_do, part).result() for part in crew.parts(item)])


_worker: Callable[[Any], Any]


def _pool(crew: Crew, devices: list[str | None]) -> ProcessPoolExecutor:
    queue = get_context("spawn").Queue()
    for number, device in enumerate(devices):
        queue.put((number, device))
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // len(devices)))
    return workers(len(devices), threads, _begin, (queue, crew.make, crew.on_devices))


def _begin(queue, make: Callable[[str | None], Callable], on_devices: bool) -> None:
    """In a process: take a device from the queue, and make the worker."""
    global _worker
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(Exit.INTERRUPTED))
    number, device = queue.get()
    _worker = make(device or (_device_of(number) if on_devices else None))


def _device_of(number: int) -> str | None:
    """The device of process `number` if there are several of a kind; else None."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count > 1 else None


def _do(item: Any) -> Any:
    return _worker(item)
