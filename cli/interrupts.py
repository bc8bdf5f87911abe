"""A request to stop that Python would drop is made again."""

from __future__ import annotations

import os
import signal
import sys
import threading

AGAIN = 0.05  # seconds: by then what was being taken away is gone


def insist_on_interrupts() -> None:
    """Send a signal to stop again when its KeyboardInterrupt was lost: an exception that is raised while Python takes
    an object away (in `__del__`, in the callback of a weak reference) goes to `sys.unraisablehook` and no further, so
    that a Ctrl-C, or a SIGTERM during training, at that moment would be without effect."""
    before = sys.unraisablehook
    if before.__module__ == __name__:  # set up already
        return

    def hook(lost) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            return before(lost)
        again = threading.Timer(AGAIN, _send, (_number(),))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def _send(number: int) -> None:
    if os.name == "nt":  # os.kill would end the process there
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)


def _number() -> int:
    """SIGINT; SIGTERM where a shell has this process in the background, with SIGINT ignored."""
    return signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
