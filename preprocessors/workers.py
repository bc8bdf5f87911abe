"""Worker processes, by default one per core and of one thread each; they end when the process that started them is
gone."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def workers(
    count: int | None = None, threads: int = 1, initializer: Callable | None = None, initargs: tuple = ()
) -> ProcessPoolExecutor:
    """A pool of `count` new processes, by default one per core, of so many threads each. Each begins with
    `initializer(*initargs)`, a function of a module."""
    first = (os.getpid(), threads, initializer, initargs)
    return ProcessPoolExecutor(count or os.cpu_count(), get_context("spawn"), initializer=_begin, initargs=first)


def _begin(parent: int, threads: int, initializer: Callable | None, initargs: tuple) -> None:
    import cv2

    cv2.setNumThreads(threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command has it
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for torch, if it is imported later
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a parent that was killed could not stop us

    threading.Thread(target=watch, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)
