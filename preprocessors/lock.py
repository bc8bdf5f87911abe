"""One writer at a time for a folder: a lock of the operating system's, gone when its process is, however it ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controlnet.preprocessors.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: no lock, and no run is told to be running
    fcntl = None  # type: ignore[assignment]

ORPHANED = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""Sent to a process that holds a folder for another one, when that one is gone: save, and let go."""


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder; gives the handle, -1 where there are no locks. Raises UsageError when another process holds
    it."""
    handle = _take(folder)
    if handle is None:
        raise UsageError(f"{folder}: another command is at work in it", f"controlnet status {folder}")
    try:
        yield handle
    finally:
        if handle >= 0:
            os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether some process holds the folder, this one included."""
    handle = _take(folder)
    if handle is not None and handle >= 0:
        os.close(handle)
    return handle is None


def _take(folder: Path) -> int | None:
    """A handle that holds the lock until it is closed, -1 where there are no locks, None when another one holds it."""
    if fcntl is None:
        return -1
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        os.close(handle)
        return -1
    return handle
