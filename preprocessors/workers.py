"""Worker processes: one per core, one thread each; they end when the process that started them is gone."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def workers(count: int | None = None) -> ProcessPoolExecutor:
    """A pool of `count` new processes, by default one per core."""
    return ProcessPoolExecutor(
        count or os.cpu_count(), get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
    )


def _begin(parent: int) -> None:
    import cv2

    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, if it is imported later
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a parent that was killed could not stop us

    threading.Thread(target=watch, daemon=True).start()
