"""How a run is asked to stop: by SIGTERM or SIGINT, or by the end of its terminal or of the command that started it."""

from __future__ import annotations

import os
import signal
import threading

from controlnet.model.training.parallel import Parallel
from controlnet.preprocessors.lock import HANGUP, ORPHANED, endings


class Stop:
    """Whether a signal has asked the run to stop; all its processes get the same answer. A second SIGTERM or SIGINT
    does not wait for the checkpoint. ORPHANED always does, since it reaches the processes up to a second apart, and so
    does HANGUP, which shells send more than once."""

    signal: int | None = None
    """The signal that this process was sent."""
    agreed: bool = False
    """Whether some process of the run was sent one."""

    def __enter__(self) -> Stop:
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self._note) for s in {signal.SIGINT, ORPHANED, *endings()}}
            self.terminals = [handle for handle in (1, 2) if os.isatty(handle)]
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, signal.SIG_IGN if self.agreed and number == ORPHANED else handler)

    def _note(self, number: int, frame: object) -> None:
        if number == HANGUP:
            self._let_go_of_terminals()
        elif self.signal is not None and number != ORPHANED:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def _let_go_of_terminals(self) -> None:
        """They are gone, and to write to them would be an error before anything is saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in self.terminals:
            os.dup2(nowhere, handle)
        os.close(nowhere)

    def asked(self, parallel: Parallel) -> bool:
        self.agreed = parallel.any(self.signal is not None)
        return self.agreed
