"""How a run is asked to stop: by SIGTERM or SIGINT, or by the end of the command that started it."""

from __future__ import annotations

import signal
import threading

from controlnet.model.training.parallel import Parallel
from controlnet.preprocessors.lock import ORPHANED


class Stop:
    """Whether a signal has asked the run to stop; all its processes get the same answer. A second SIGTERM or SIGINT
    does not wait for the checkpoint; ORPHANED always does, since it reaches the processes up to a second apart."""

    signal: int | None = None
    """The signal that this process was sent."""
    agreed: bool = False
    """Whether some process of the run was sent one."""

    def __enter__(self) -> Stop:
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, ORPHANED)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, signal.SIG_IGN if self.agreed and number == ORPHANED else handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None and number != ORPHANED:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def asked(self, parallel: Parallel) -> bool:
        self.agreed = parallel.any(self.signal is not None)
        return self.agreed
