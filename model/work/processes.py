"""One command in several processes that share their work, as `--processes N` asks for.

torch's own launcher would not do: a signal must reach every process once and let it save, a user error must be reported
once, and the exit code must be the command's own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack

from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.lock import HANGUP, ORPHANED, endings

PARENT = "CONTROLNET_PARENT"
"""The environment variable with the id of the process that started this one."""
PATIENCE = 30.0
"""Seconds that processes get to end after a signal, or after another one of them has failed."""
GRACE = 5.0
"""Seconds that a process gets to notice that the one that started it is gone."""


def launch(processes: int, args: list[str], lock: int = -1) -> int:
    """Run `controlnet ARGS` in `processes` processes, which find each other through Accelerate's environment variables;
    returns the exit code of the first one, or of the one that failed.

    Only the first process prints; the standard error of another one is shown if it failed and the first did not.
    SIGTERM and SIGINT are handed on; a second one kills. `lock` is a handle that the processes hold too, so that what
    it locks stays locked as long as one of them lives. They stop by themselves when this process is gone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    with ExitStack() as files:
        errors = [None] + [files.enter_context(tempfile.TemporaryFile()) for _ in range(processes - 1)]
        children = [
            subprocess.Popen(
                command_of(args),
                stdin=subprocess.DEVNULL,
                stdout=error and subprocess.DEVNULL,
                stderr=error,
                start_new_session=True,  # Ctrl-C in a terminal reaches only us, and we hand it on
                env={
                    **os.environ,
                    **shared,
                    "OMP_NUM_THREADS": threads,
                    "RANK": str(i),
                    "LOCAL_RANK": str(i),
                    PARENT: str(os.getpid()),
                },
                pass_fds=(lock,) if lock >= 0 else (),
            )
            for i, error in enumerate(errors)
        ]
        asked = _hand_on_signals(children)
        failed = _wait(children)
        if failed and (error := errors[failed]):
            error.seek(0)
            sys.stderr.write(error.read().decode(errors="replace"))
    code = children[failed].returncode
    if code < 0 and asked:  # by us, before it could save or while it did
        return Exit.INTERRUPTED
    if code < 0:
        print(f"error: process {failed} of {processes} was killed by signal {-code}", file=sys.stderr)
        print("hint: the system does that when memory runs out; --resume goes on", file=sys.stderr)
    return code if code >= 0 else 128 - code


def stop_without_parent() -> None:
    """In a process that `launch` started: when the one that started it is gone, save and stop. Until training installs
    its handler of ORPHANED there is nothing to save. A process that is blocked in native code, waiting for another one
    that is gone, never runs a handler of Python: this thread ends it after GRACE seconds."""
    parent = int(os.environ.get(PARENT, 0))
    if not parent:
        return
    handler = signal.getsignal(ORPHANED)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), ORPHANED)
        time.sleep(GRACE)
        if signal.getsignal(ORPHANED) is handler:
            os._exit(Exit.INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def command_of(args: list[str]) -> list[str]:
    return [sys.executable, "-m", "controlnet.cli.main", *args]


def _hand_on_signals(children: list[subprocess.Popen]) -> list[int]:
    """From now on signals go to the children; returns the list of those that did."""
    asked: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
        asked.append(number)

    def hang_up(number: int, frame: object) -> None:  # shells send it more than once
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in endings() | {signal.SIGINT}:
        signal.signal(number, hang_up if number == HANGUP != signal.SIGTERM else hand_on)
    return asked


def _wait(children: list[subprocess.Popen]) -> int:
    """Wait for all; returns the index of the process whose exit code counts: the first, unless another one failed and
    the first did not."""
    well = (None, Exit.OK, Exit.INTERRUPTED)  # still at work, done, or stopped as asked
    while (failed := next((i for i, c in enumerate(children) if c.poll() not in well), None)) is None:
        if all(child.poll() is not None for child in children):
            return 0
        time.sleep(0.05)
    for seconds, stop in ((3.0, signal.SIGTERM), (PATIENCE, signal.SIGKILL)):  # often all fail alike, a moment apart
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(child.poll() is None for child in children):
            time.sleep(0.05)
        if children[0].poll() not in well and stop is signal.SIGTERM:
            failed = 0
        for child in children:
            if child.poll() is None:
                child.send_signal(stop)
    for child in children:
        child.wait()
    return failed
