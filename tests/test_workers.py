"""Worker processes do their work on one thread each, and do not outlive the one that started them."""

import os
import signal
import subprocess
import sys
import time

import pytest
from controlnet.preprocessors.workers import workers

STARTED = """
import os, time
from controlnet.preprocessors.workers import workers
if __name__ == "__main__":
    with workers(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60).result()
"""


def test_they_work_on_one_thread_each():
    with workers(1) as pool:
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
        assert pool.submit(os.getpid).result() != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_they_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "started.py").write_text(STARTED)
    with subprocess.Popen([sys.executable, tmp_path / "started.py"], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            with open(f"/proc/{worker}/stat") as file:
                if file.read().split(")")[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker is still there after 10 seconds")
