"""What makes large imports quick, and what must be set before torch is one of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """While this lasts, nobody looks for garbage: of a million objects of modules none is, and to find that out takes a
    quarter of the time of their import."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def share_cores() -> None:
    """Make threads of torch that wait for each other sleep after a moment, in place of spinning; to be called before
    torch is imported.

    By default they spin for milliseconds, on the cores that another command needs: two that made images at once took 88
    s in place of 10 (benchmarks/LOG.md). What the environment says stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
