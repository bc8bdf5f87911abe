"""Worker processes: one for each core, a thread each, gone when the process that started them is gone."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def workers(count: int | None = None) -> ProcessPoolExecutor:
    """A pool of `count` new processes, as many as there are cores by default."""
    return ProcessPoolExecutor(
        count or os.cpu_count(), get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
    )


def _begin(parent: int) -> None:
    import cv2

    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of torch, where it is imported later
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # killed, it could not tell us

    threading.Thread(target=watch, daemon=True).start()
