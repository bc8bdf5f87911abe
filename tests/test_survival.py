"""Training that is killed, stopped, shared between processes, or runs out of disk."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.report import read_run
from controlnet.model.training.run import train
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.errors import Exit, OutputError
from controlnet.preprocessors.lock import is_locked
from helpers import losses

CPU = torch.device("cpu")


def start(data, config, folder, *more, stderr=subprocess.PIPE):
    settings = {"max_steps": 30, "batch_size": 2, "validate_every": 10, "held_out": 2, "pictures": 0,
                "save_every": 1e-9, "log_every": 1, "learning_rate": 1e-3, "warmup_steps": 0}  # fmt: skip
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "controlnet.cli.main", "train", data, "--base", config.base, "-o", folder]
    command = [*map(str, command), *sets, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(data, config, tmp_path):
    """Three times (`make torture` does it 50 times). Every step writes a checkpoint, so kills fall into writing."""
    kills = 3
    steps = 10 * kills  # a process gets some steps further before it is killed
    chance = random.Random(0)
    length = ("--set", f"max_steps={steps}")
    whole = start(data, config, tmp_path / "whole", *length)
    assert whole.wait(200) == 0, whole.stderr.read()
    folder = tmp_path / "cut"
    resume = ()
    for step in (1 + (steps - 6) * i // kills for i in range(kills)):
        process = start(data, config, folder, *length, *resume)
        last = (Checkpoints(folder / "checkpoints").steps() or [0])[-1]
        step = max(step, last + 1)  # this process has got beyond where the one before it was killed
        wait_for(lambda step=step: (Checkpoints(folder / "checkpoints").steps() or [0])[-1] >= step, process)
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None
        process.kill()
        process.communicate()
        resume = ("--resume",)
    process = start(data, config, folder, *length, "--resume")
    assert process.wait(600) == 0
    for finished in (whole, process):
        finished.communicate()
    assert losses(tmp_path / "whole") == losses(folder)
    a, b = (Checkpoints(tmp_path / n / "checkpoints").load() for n in ("whole", "cut"))
    assert all(torch.equal(x, y) for k in ("parameters", "ema") for x, y in zip(a[k], b[k], strict=True))


def test_two_processes_train_as_one(data, config, tmp_path):
    for name, more in (("one", ()), ("two", ("--processes", "2"))):
        process = start(data, config, tmp_path / name, "--set", "max_steps=6", *more)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    one, two = (np.array([loss for _, loss in losses(tmp_path / n)]) for n in ("one", "two"))
    assert len(one) == 6 and np.allclose(one, two, rtol=1e-5)
    one, two = (Checkpoints(tmp_path / n / "checkpoints").load()["ema"] for n in ("one", "two"))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_and_saves(data, config, tmp_path, number):
    folder = tmp_path / "run"
    process = start(data, config, folder, "--set=max_steps=100000", "--set=save_every=1e9", "--processes", "2")
    wait_for(lambda: (folder / "log.jsonl").is_file() and len(losses(folder)) >= 5, process)
    assert is_locked(folder)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == Exit.INTERRUPTED, err
    (step,) = Checkpoints(folder / "checkpoints").steps()
    assert step >= 5 and err.count(f"stopped at step {step}, saved") == 1 and not is_locked(folder)


def test_processes_end_with_the_one_that_started_them(data, config, tmp_path):
    """kill -9 of the command: its processes save and stop, and until then nobody else gets the folder."""
    folder = tmp_path / "run"
    process = start(data, config, folder, "--set=max_steps=100000", "--set=save_every=1e9", "--processes", "2")
    wait_for(lambda: (folder / "log.jsonl").is_file() and len(losses(folder)) >= 5, process)
    process.kill()
    process.wait()
    assert is_locked(folder)
    end = time.monotonic() + 240
    while is_locked(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_locked(folder) and Checkpoints(folder / "checkpoints").steps()
    process.communicate()


WAITS = """
from pathlib import Path
from controlnet.cli.train import _stoppable
from torch.distributed import TCPStore
with _stoppable(Path("run")):
    print("waits", flush=True)
    TCPStore("127.0.0.1", 0, world_size=2, is_master=True)  # for a second process, which never comes
"""
STARTS = """
import os, subprocess, sys
os.environ["CONTROLNET_PARENT"] = str(os.getpid())
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, stderr=sys.stderr)
print(process.stdout.readline().decode(), flush=True)
"""


def test_a_process_that_waits_for_one_that_is_gone_ends_too():
    """Two processes meet before the first step; the wait is in C++, where no signal handler of Python runs."""
    command = [sys.executable, "-c", STARTS, WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=60)  # to the end of what either writes
    assert out.strip() == "waits" and "Error" not in err, err


def test_sigterm_before_the_first_step(data, config, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(300):
        for name in (f"{i % 12}.png", f"{i % 12}.txt"):
            (photos / f"{i}{name[-4:]}").write_bytes((data / name).read_bytes() + b" " * (i * name.endswith("txt")))
    folder = tmp_path / "run"
    process = start(photos, config, folder, "--set=crops=60")
    wait_for(lambda: (folder / "run.json").is_file(), process)
    assert read_run(folder).state == "preparing"
    process.terminate()
    _, err = process.communicate(timeout=240)
    assert process.returncode == Exit.INTERRUPTED and "stopped before the first step" in err and not folder.exists(), (
        err
    )


def test_an_error_of_one_or_all_processes_is_told_once(data, config, tmp_path):
    process = start(data, config, tmp_path / "run", "--processes", "2", "--set=start_from=nowhere")
    _, err = process.communicate(timeout=240)
    assert process.returncode == Exit.USAGE and err.count("error:") == 1 and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


def test_launch_speaks_for_the_process_that_failed(tmp_path):
    """A stand-in for the command: one process fails in its own way, the others would wait for ever."""
    (tmp_path / "child.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('mine alone')\ntime.sleep(1000)"
    )
    (tmp_path / "parent.py").write_text(
        "import sys\nimport controlnet.model.work.processes as launch\n"
        "launch.command_of = lambda args: [sys.executable, *args]\n"
        f"sys.exit(launch.launch(3, [{str(tmp_path / 'child.py')!r}]))"
    )
    command = [sys.executable, tmp_path / "parent.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "mine alone" in done.stderr


def test_launch_tells_of_no_memory_when_it_was_asked_to_stop(tmp_path):
    """Before its processes handle signals; the system ends them then."""
    (tmp_path / "child.py").write_text("import time\ntime.sleep(1000)")
    (tmp_path / "parent.py").write_text(
        "import sys\nimport controlnet.model.work.processes as launch\n"
        "launch.command_of = lambda args: [sys.executable, *args]\n"
        "wait = launch._wait\n"
        "launch._wait = lambda children: print('here', flush=True) or wait(children)\n"
        f"sys.exit(launch.launch(2, [{str(tmp_path / 'child.py')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == Exit.INTERRUPTED and err == ""


def test_a_terminal_that_closes_saves(data, config, tmp_path):
    folder = tmp_path / "run"
    ours, theirs = os.openpty()
    process = start(data, config, folder, "--set=max_steps=100000", "--set=save_every=1e9", stderr=theirs)
    os.close(theirs)
    os.set_blocking(ours, False)

    def begun():
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 4096)
        return (folder / "log.jsonl").is_file() and len(losses(folder)) >= 5

    wait_for(begun, process)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=240)
    assert process.returncode == Exit.INTERRUPTED
    assert Checkpoints(folder / "checkpoints").steps()[0] >= 5


def test_sigterm_saves_and_says_how_to_go_on(data, config, tmp_path):
    folder = tmp_path / "run"
    process = start(data, config, folder, "--set", "max_steps=100000", "--set", "save_every=1e9")
    wait_for(lambda: (folder / "log.jsonl").is_file() and len(losses(folder)) >= 5, process)
    process.terminate()
    _, err = process.communicate(timeout=240)
    assert process.returncode == Exit.INTERRUPTED
    (step,) = Checkpoints(folder / "checkpoints").steps()
    assert step >= 5 and f"stopped at step {step}, saved" in err and f"--resume -o {folder}" in err


@pytest.mark.parametrize("limit", [20_000, 100_000])
def test_a_full_disk_leaves_the_last_good_state(data, config, tmp_path, limit):
    """No file may grow beyond the limit: the smaller one stops the network's weights, the larger one its checkpoint."""
    found = find_pairs(data)
    train(found, replace(config, max_steps=3), tmp_path / "run", CPU)

    def good():
        names = [*(tmp_path / "run/checkpoints").iterdir(), tmp_path / "run/diffusion_pytorch_model.safetensors"]
        return {p: p.read_bytes() for p in names}

    before = good()
    before_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before_limit[1]))
    try:
        with pytest.raises(OutputError) as error:
            train(found, config, tmp_path / "run", CPU, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before_limit)
    assert "free some disk" in error.value.hint
    assert good() == before and not list((tmp_path / "run").rglob("*.tmp"))
    assert train(found, config, tmp_path / "run", CPU, resume=True).step == 6
