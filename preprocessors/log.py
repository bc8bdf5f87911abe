"""What is done, and how long it takes, for those who ask: the logger `controlnet`, at level INFO."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOG = logging.getLogger("controlnet")
LOG.addHandler(logging.NullHandler())


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Log what is done inside when it is done, with its seconds; also when it fails."""
    start = time.perf_counter()
    try:
        yield
    except BaseException as error:
        LOG.info("%s: failed after %.2f s (%s)", what, time.perf_counter() - start, type(error).__name__)
        raise
    LOG.info("%s: %.2f s", what, time.perf_counter() - start)
