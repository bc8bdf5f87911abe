"""A Ctrl-C or SIGTERM that comes while Python takes an object away."""

import signal
import subprocess
import sys

import pytest

LOST = """
import os, signal, sys, time
from controlnet.cli.interrupts import insist_on_interrupts

def stop(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
if sys.argv[1] == "background":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
insist_on_interrupts()

class Held:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(0)

try:
    held = Held()
    del held
    time.sleep(20)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize(
    "shell, number",
    [("foreground", signal.SIGINT), ("foreground", signal.SIGTERM), ("background", signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM in the background"],
)
def test_an_interrupt_in_a_finaliser_is_not_lost(shell, number):
    done = subprocess.run(
        [sys.executable, "-c", LOST, shell, str(int(number))], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_other_errors_in_finalisers_are_still_told():
    code = (
        "from controlnet.cli.interrupts import insist_on_interrupts\n"
        "insist_on_interrupts()\n"
        "class Held:\n    def __del__(self):\n        raise ValueError('kept')\n"
        "held = Held()\ndel held\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ValueError: kept" in done.stderr


def test_the_command_line_insists(monkeypatch):
    """Asked of the command itself: it is set up before a command runs."""
    from controlnet.cli.main import main

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert sys.unraisablehook.__module__ == "controlnet.cli.interrupts"
