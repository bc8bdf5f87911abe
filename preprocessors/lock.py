"""One writer at a time per folder: an operating-system lock that goes away with its process, however that ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controlnet.preprocessors.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: no lock, so no run is ever reported as running
    fcntl = None  # type: ignore[assignment]

ORPHANED = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""The signal for a process whose parent command is gone: save, and release the folder."""
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
"""The signal for a process whose terminal is gone."""
WAIT = 0.5
"""Seconds that `locked` waits for those who only look."""


def endings() -> set[int]:
    """The signals that ask this process to end: SIGTERM, and SIGHUP unless `nohup` has it ignored."""
    return {signal.SIGTERM} | ({HANGUP} if signal.getsignal(HANGUP) is not signal.SIG_IGN else set())


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder; yields the lock's handle, -1 where there are no locks. Raises UsageError when another process
    holds it."""
    until = time.monotonic() + WAIT
    while (handle := _take(folder)) is None and time.monotonic() < until:
        time.sleep(0.02)
    if handle is None:
        raise UsageError(f"{folder}: another command is at work in it", f"controlnet status {folder}")
    try:
        yield handle
    finally:
        if handle >= 0:
            os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether some process holds the folder, this one included. Those who look do not disturb each other."""
    handle = _take(folder, shared=True)
    if handle is not None and handle >= 0:
        os.close(handle)
    return handle is None


def _take(folder: Path, shared: bool = False) -> int | None:
    """A handle that holds the lock until it is closed, -1 where there are no locks, None when it is held already."""
    if fcntl is None:
        return -1
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        os.close(handle)
        return -1
    return handle
