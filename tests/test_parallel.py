"""Training in several processes: DDP and FSDP2 give what one process gives, and each reads what another has saved."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import DistributedType
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.optimizers import make_optimizer
from controlnet.model.training.parallel import Parallel, take_apart
from controlnet.model.training.run import train
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.errors import Exit, UsageError
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.tars import write_tar
from helpers import log_of, losses
from test_survival import start, wait_for
from torch import nn

CPU = torch.device("cpu")
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What Accelerate's launcher sets for a configuration with FSDP2."""


def in_processes(data, config, folder, *more, launcher=None):
    """`controlnet train` in processes of its own, to the end; `launcher` is what one has set."""
    settings = {"max_steps": config.max_steps, "batch_size": 4, "validate_every": 3, "held_out": 3, "pictures": 1,
                "save_every": 1e9, "keep": 3}  # fmt: skip
    more = (*(f"--set={key}={value}" for key, value in settings.items()), *more)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (launcher or {}).items():
            patch.setenv(name, value)
        process = start(data, config, folder, *more)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def test_processes_are_taken_apart(tmp_path):
    """Where nothing connects them there is nothing to do."""
    take_apart()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    take_apart()
    assert not torch.distributed.is_initialized()


def same_losses(one, two):
    a, b = (np.array([loss for _, loss in losses(folder)]) for folder in (one, two))
    return len(a) == len(b) > 0 and np.allclose(a, b, rtol=1e-5)


def test_shards_train_as_one_process_and_are_read_by_any_number(data, config, tmp_path):
    """FSDP2 on two processes, then on from its sharded state in one process, in four, and in two with DDP."""
    config = replace(config, max_steps=9)
    train(find_pairs(data), config, tmp_path / "one", CPU)
    folder = tmp_path / "shards"
    in_processes(data, replace(config, max_steps=6), folder, "--processes", "2", launcher=SHARDED)
    saved = Checkpoints(folder / "checkpoints")
    assert saved.path(6).is_dir() and len(list(saved.path(6).glob("*.distcp"))) == 2
    assert same_losses_until(6, tmp_path / "one", folder)
    step = next(row for row in log_of(folder) if row.get("step") == 6 and "lr" in row)
    assert len(step["forward_seconds"]) == 2 and step["pairs_per_second"] > 0

    # Read whole without any process group.
    one, two = Checkpoints(tmp_path / "one/checkpoints").load(), saved.load()
    assert two["progress"]["step"] == 6 and len(one["ema"]) == len(two["ema"])

    for name, launcher in (("4", SHARDED), ("2", None), ("1", None)):
        copy = tmp_path / f"on-{name}"
        shutil.copytree(folder, copy)
        if name == "1":
            train(find_pairs(data), config, copy, CPU, resume=True)
        else:
            in_processes(data, config, copy, "--resume", "--processes", name, launcher=launcher)
        assert same_losses(tmp_path / "one", copy), name
        last = Checkpoints(copy / "checkpoints").load()
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(one["ema"], last["ema"], strict=True))

    # A damaged shard: on from the state before.
    next(saved.path(6).glob("__1_*.distcp")).write_bytes(b"short")
    train(find_pairs(data), config, folder, CPU, resume=True)
    assert saved.path(6).with_suffix(".damaged").is_dir() and same_losses(tmp_path / "one", folder)


def same_losses_until(step, one, two):
    a, b = (np.array([loss for at, loss in losses(folder) if at <= step]) for folder in (one, two))
    return len(a) == len(b) == step and np.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_run_which_goes_on_later(data, config, tmp_path, victim):
    folder = tmp_path / "run"
    process = start(data, config, folder, "--set=max_steps=40", "--processes", "2")
    wait_for(lambda: (folder / "log.jsonl").is_file() and len(losses(folder)) >= 5, process)
    children = {p.environ()["RANK"]: p for p in psutil.Process(process.pid).children()}
    children[str(victim)].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0 and err.count("error:") == 1 and "--resume" in err and "Traceback" not in err, err
    assert ("was killed by signal 9" if victim == 0 else "another process of this run is gone") in err
    settings = {"max_steps": 40, "batch_size": 2, "validate_every": 10, "held_out": 2, "pictures": 0}
    config = replace(config, **settings)
    train(find_pairs(data), config, folder, CPU, resume=True)
    train(find_pairs(data), config, tmp_path / "one", CPU)
    assert same_losses(tmp_path / "one", folder)


def broken_late(folder):
    """Six tar files, of which one has a picture that none can read."""
    rng = np.random.default_rng(0)
    for number in range(6):
        files = []
        for i in range(16):
            picture = png_bytes(np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8)))
            broken = number == 5 and i == 11
            files += [(f"{i:04d}.png", b"not a picture" if broken else picture), (f"{i:04d}.txt", b"a cube")]
        write_tar(folder / f"{number}.tar", files)
    return f"{folder}/*.tar"


@pytest.mark.parametrize("sharded", [False, True])
def test_an_error_of_one_process_is_told_and_all_save(config, tmp_path, monkeypatch, sharded):
    for name, value in SHARDED.items() if sharded else ():
        monkeypatch.setenv(name, value)
    data, folder = broken_late(tmp_path), tmp_path / "run"
    more = ("--kind", "canny", "--set=max_steps=60", "--set=batch_size=4", "--set=save_every=1e9",
            "--set=validate_every=100", "--processes", "2")  # fmt: skip
    process = start(data, config, folder, *more)
    _, err = process.communicate(timeout=240)
    assert process.returncode == Exit.INPUT and err.count("error:") == 1 and "Traceback" not in err, err
    assert "5.tar#0011.png: is not a picture" in err
    (step,) = Checkpoints(folder / "checkpoints").steps()
    assert step == losses(folder)[-1][0] > 0


def test_a_full_disk_under_shards_is_told_and_leaves_nothing(data, config, tmp_path):
    command = f"ulimit -f 300; exec {sys.executable} -m controlnet.cli.main train {data} --base {config.base}"
    sets = {"max_steps": 20, "batch_size": 2, "validate_every": 10, "held_out": 2, "pictures": 0, "save_every": 1e-9}
    command += f" -o {tmp_path}/run --processes 2 " + " ".join(f"--set {k}={v}" for k, v in sets.items())
    environment = os.environ | SHARDED
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == Exit.OUTPUT and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1 and "free some disk" in done.stderr
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_what_another_launcher_starts_needs_a_named_folder(data, config):
    """As torchrun or SLURM would start it; each process would count for itself."""
    command = [sys.executable, "-m", "controlnet.cli.main", "train", str(data), "--base", config.base]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 2 and "hint: -o runs/NAME" in done.stderr


@pytest.mark.parametrize("optimizer, precision", [("muon", "float32"), ("adamw8bit", "float32"), ("adamw", "float16")])
def test_what_cannot_be_sharded_is_refused(optimizer, precision):
    parallel = Parallel(CPU)
    parallel.check(optimizer, precision)
    accelerator = SimpleNamespace(is_fsdp2=True, distributed_type=DistributedType.FSDP)
    parallel.accelerator = accelerator
    with pytest.raises(UsageError, match=optimizer if precision == "float32" else precision):
        parallel.check(optimizer, precision)
    accelerator.is_fsdp2, accelerator.distributed_type = False, DistributedType.MEGATRON_LM
    with pytest.raises(UsageError, match="MEGATRON_LM"):
        parallel.check("adamw", "float32")


def test_moments_in_8_bits():
    """They take a quarter of the memory at most, and the network learns as with whole ones."""
    pytest.importorskip("bitsandbytes")
    ends = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        net = nn.Linear(64, 64)  # 4096 weights: the least that is kept in 8 bits
        optimizer = make_optimizer(net, name, 1e-2, 0.0)
        for step in range(40):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            loss = (net(x) - x.flip(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[name] = float(loss.detach())
        moments = optimizer.state[net.weight]
    assert {moments[name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert ends["adamw"] < 0.5 and ends["adamw8bit"] == pytest.approx(ends["adamw"], rel=0.1)


def test_a_missing_package_for_8_bits_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UsageError, match="bitsandbytes") as error:
        make_optimizer(nn.Linear(4, 4), "adamw8bit", 1e-2, 0.0)
    assert "controlnet-toolkit[8bit]" in error.value.hint


def test_a_run_with_8_bits_resumes(data, config, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = replace(config, optimizer="adamw8bit", max_steps=6)
    train(find_pairs(data), config, tmp_path / "whole", CPU)
    train(find_pairs(data), replace(config, max_steps=3), tmp_path / "cut", CPU)
    train(find_pairs(data), config, tmp_path / "cut", CPU, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
