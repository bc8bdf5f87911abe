"""Training by DeepSpeed's ZeRO: it gives what one process gives, and its states are read by any number of processes."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.parallel import Parallel
from controlnet.model.training.run import train
from controlnet.model.training.state import State
from controlnet.model.training.zero import check_zero
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.errors import UsageError
from test_parallel import CPU, SHARDED, in_processes, same_losses, same_losses_until
from torch import nn

ZERO = {
    stage: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)
}
"""What Accelerate's launcher sets for a configuration with DeepSpeed."""


def test_zero_trains_as_one_process_and_goes_on_from_any(data, config, tmp_path):
    """Stage 2 on two processes, then FSDP2, which reads its state, then stage 1, which reads shards, then one process;
    each step of two batches."""
    pytest.importorskip("deepspeed")
    config = replace(config, max_steps=9, accumulation=2)
    train(find_pairs(data), config, tmp_path / "one", CPU)
    folder = tmp_path / "run"
    saved = Checkpoints(folder / "checkpoints")
    more, two = ("--set=accumulation=2", "--set=warmup_steps=0"), ("--processes", "2")
    in_processes(data, replace(config, max_steps=3), folder, *more, *two, launcher=ZERO[2])
    moments = torch.load(saved.path(3), weights_only=True)["optimizer"]["state"]
    assert all(one["exp_avg_sq"].max() > 0 and one["step"] == 3 for one in moments.values())
    for steps, launcher in ((5, SHARDED), (7, ZERO[1])):
        in_processes(data, replace(config, max_steps=steps), folder, *more, *two, "--resume", launcher=launcher)
        assert same_losses_until(steps, tmp_path / "one", folder), steps
    train(find_pairs(data), config, folder, CPU, resume=True)
    assert same_losses(tmp_path / "one", folder)
    one, last = (Checkpoints(path / "checkpoints").load() for path in (tmp_path / "one", folder))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(one["ema"], last["ema"], strict=True))


@pytest.mark.parametrize(
    "config, named",
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3"),
        ({}, "ZeRO stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer=cpu"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "optimizer"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16"),
    ],
)
def test_what_zero_cannot_do_is_refused_by_name(config, named):
    with pytest.raises(UsageError, match=named):
        check_zero(config)
    check_zero({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "bf16": {"enabled": False}})


def test_a_missing_deepspeed_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("controlnet.model.training.parallel.is_deepspeed_available", lambda: False)
    with pytest.raises(UsageError) as error:
        Parallel(CPU)
    assert "controlnet-toolkit[deepspeed]" in error.value.hint


def test_both_processes_refuse_with_one_error(data, config, tmp_path):
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "controlnet.cli.main", "train", str(data), "--base", config.base]
    command += ["-o", str(tmp_path / "run"), "--processes", "2", "--set=batch_size=4", "--set=held_out=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ZERO[3], timeout=120)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "ZeRO stage 3" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_moments_are_read_in_the_layout_of_their_parameters():
    """Fused AdamW reads both as they lie in memory, whatever their strides."""
    torch.manual_seed(0)
    ends = []
    for again in (False, True):
        net = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        net.load_state_dict(
            {name: torch.linspace(-1, 1, p.numel()).view(p.shape) for name, p in net.named_parameters()}
        )
        state = State(net, "adamw", 1e-2, 0.0, "float32", Parallel(CPU))
        for step in range(3):
            if again and step == 2:
                saved = state.saved()
                moments = {
                    n: {k: v.clone(memory_format=torch.contiguous_format) for k, v in one.items()}
                    for n, one in saved["optimizer"]["state"].items()
                }
                state.load(saved | {"optimizer": saved["optimizer"] | {"state": moments}})
            x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
            state.backward(net(x).square().mean())
            state.update(1e-2, 0.9)
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)
