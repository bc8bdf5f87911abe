"""The training loop: it learns, resumes exactly, and never leaves half a checkpoint."""

import errno
import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from controlnet.model.training import signals
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.loop import ExplodedError, LoopConfig, fit
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.lock import ORPHANED
from torch import nn

CONFIG = LoopConfig(max_steps=30, learning_rate=1e-2, warmup_steps=3, log_every=5, save_every=1e-9)


def setup():
    torch.manual_seed(0)
    net = nn.Linear(4, 2)

    def loss_of(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (net(x) - x[:, :2]).square().mean()

    return net, loss_of


def log_of(folder):
    return [row for row in everything_in(folder) if "loss" in row]


def everything_in(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_logs(tmp_path):
    net, loss_of = setup()
    progress = fit(net, loss_of, CONFIG, tmp_path)
    assert progress.step == 30
    logged = log_of(tmp_path)
    assert [row["step"] for row in logged] == [5, 10, 15, 20, 25, 30]
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    assert everything_in(tmp_path)[-1] == {"step": 30, "ended": "finished"}


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7, 29])
def test_interrupted_and_resumed_is_the_same_run(tmp_path, at):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path / "whole")
    expected = [p.clone() for p in net.parameters()]

    net, loss_of = setup()

    def failing(step):
        if step == at:
            raise Stop
        return loss_of(step)

    with pytest.raises(Stop):
        fit(net, failing, CONFIG, tmp_path / "cut")
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(expected, net.parameters(), strict=True))
    assert list((tmp_path / "cut").rglob("*.tmp")) == []
    whole, cut = ([(row["step"], row["loss"]) for row in log_of(tmp_path / n)] for n in ("whole", "cut"))
    assert whole == cut


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    net, loss_of = setup()
    fit(net, loss_of, replace(CONFIG, keep=2), tmp_path / "whole")
    folder = Checkpoints(tmp_path / "whole/checkpoints")
    good = folder.load()
    assert folder.steps() == [29, 30] and good["progress"]["step"] == 30
    folder.path(30).write_bytes(folder.path(30).read_bytes()[:500])
    assert folder.load()["progress"]["step"] == 29
    assert folder.steps() == [29]  # the damaged file no longer counts
    folder.path(29).write_bytes(b"")
    with pytest.raises(ModelError, match="no checkpoint in it can be read"):
        folder.load()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
    ],
)
def test_a_checkpoint_is_not_damaged_when_the_machine_fails(tmp_path, monkeypatch, error):
    """A GPU that others fill, a disk that is away: the file stays, under its name."""
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path)
    folder, asked = Checkpoints(tmp_path / "checkpoints"), []

    def load(path, **how):
        asked.append(how.get("map_location"))
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(torch, "load", load)
        folder.load()
    assert asked == ["cpu"]  # whatever device it was saved from, which may not be here
    assert folder.steps() == [30] and folder.load()["progress"]["step"] == 30


def test_the_state_of_another_network_is_refused(tmp_path):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path)
    larger = nn.Linear(4, 3)
    with pytest.raises(UsageError, match="of another shape"):
        fit(larger, lambda k: larger(torch.zeros(1, 4)).sum(), replace(CONFIG, max_steps=40), tmp_path)


def test_a_run_goes_on_in_float16(tmp_path):
    """Its state has no scaler yet."""
    net, loss_of = setup()
    fit(net, loss_of, replace(CONFIG, precision="float32"), tmp_path)
    progress = fit(net, loss_of, replace(CONFIG, precision="float16", max_steps=32), tmp_path)
    assert progress.step == 32


def test_a_terminal_that_is_gone_is_not_written_to(monkeypatch):
    """After SIGHUP a line of talk would be an error, before anything is saved. A second one changes nothing."""
    closed = []
    monkeypatch.setattr(os, "isatty", lambda handle: handle == 2)
    monkeypatch.setattr(os, "dup2", lambda new, old: closed.append(old))
    with signals.Stop() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal == signal.SIGHUP and set(closed) == {2}


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_run_is_not_run_again(tmp_path):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path)
    expected = [p.clone() for p in net.parameters()]
    net, _ = setup()
    fit(net, lambda step: pytest.fail("ran"), CONFIG, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected, net.parameters(), strict=True))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path)
    (last,) = (tmp_path / "checkpoints").iterdir()
    before = last.read_bytes()

    def full(obj, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError):
        fit(net, loss_of, LoopConfig(max_steps=40, save_every=1e-9), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [last.name] and last.read_bytes() == before


@pytest.mark.parametrize("factor, within", [(float("nan"), 1), (1000, 1), (10, 40)])
def test_a_loss_that_explodes_stops_the_run(tmp_path, factor, within):
    """From step 21 on the weights are bad; no checkpoint is of such a step, though every step asks for one."""
    net, loss_of = setup()
    config = replace(CONFIG, max_steps=100, learning_rate=1e-6)
    with pytest.raises(ExplodedError, match="it began at"):
        fit(net, lambda s: loss_of(s) * (factor if s > 20 else 1), config, tmp_path)
    (last,) = Checkpoints(tmp_path / "checkpoints").steps()
    assert 20 <= last < 21 + within
    ended = everything_in(tmp_path)[-1]
    assert ended["ended"] == "exploded" and last <= ended["step"] <= 21 + within


def test_weights_that_explode_in_a_step_are_never_saved(tmp_path):
    """The step after step 20 is the bad one: the checkpoint that it asks for would hold its weights."""
    net, _ = setup()

    def loss_of(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x[:, :2]).square().mean()
        return loss * 1e6 if step == 20 else loss

    config = replace(CONFIG, max_steps=100, learning_rate=1e3, clip_norm=1e9)
    with pytest.raises(ExplodedError):
        fit(net, loss_of, config, tmp_path)
    state = Checkpoints(tmp_path / "checkpoints").load()
    assert state is None or max(p.abs().max() for p in state["parameters"]) < 1e3


def test_noisy_losses_are_no_explosion(tmp_path):
    """Batches of one: a single loss may be many times another one."""
    net, loss_of = setup()
    config = replace(CONFIG, max_steps=300, log_every=1, save_every=1e9)
    fit(net, lambda s: loss_of(s) * (0.1 if s % 7 else 1.5), config, tmp_path)
    assert len(log_of(tmp_path)) == 300


def test_only_trainable_parameters_move(tmp_path):
    net, loss_of = setup()
    net.bias.requires_grad_(False)
    before = net.bias.clone()
    fit(net, loss_of, CONFIG, tmp_path)
    assert torch.equal(net.bias, before)


@pytest.mark.parametrize("field", ["max_steps", "minutes", "learning_rate"])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=field):
        LoopConfig(**{field: -1})


def test_accumulated_batches_are_one_large_one(tmp_path):
    """Four batches of 2 in a step give what one batch of 8 gives."""
    x = torch.randn(8 * 30, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        net, _ = setup()

        def loss_of(k, net=net, size=size):
            rows = x[k * size : (k + 1) * size]
            return (net(rows) - rows[:, :2]).square().mean()

        fit(net, loss_of, replace(CONFIG, accumulation=accumulation), tmp_path / str(size))
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=1e-5)


def test_validation_sees_the_average_and_training_goes_on_without_it(tmp_path):
    net, loss_of = setup()
    seen = []

    def validate(progress):
        seen.append((progress.step, net.weight.detach().clone(), net.training))
        return {"validation_loss": float(net.weight.detach().square().sum())}

    fit(net, loss_of, replace(CONFIG, validate_every=10), tmp_path / "a", validate=validate)
    assert [step for step, *_ in seen] == [0, 10, 20, 30] and not any(training for *_, training in seen)
    assert torch.equal(seen[-1][1], net.weight)
    other, loss_of = setup()
    fit(other, loss_of, CONFIG, tmp_path / "b")
    assert torch.equal(net.weight, other.weight)


def test_the_last_checkpoints_and_the_best_one_are_kept(tmp_path):
    net, loss_of = setup()
    losses = {0: 9.0, 5: 1.0}
    config = replace(CONFIG, keep=2, validate_every=5)
    progress = fit(net, loss_of, config, tmp_path, validate=lambda p: {"validation_loss": losses.get(p.step, 5.0)})
    assert progress.best_step == 5
    assert Checkpoints(tmp_path / "checkpoints").steps() == [5, 29, 30]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_checkpoint(tmp_path, number):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path / "whole")
    expected = net.weight.clone()

    net, loss_of = setup()

    def signalled(step):
        if step == 12:
            os.kill(os.getpid(), number)
        return loss_of(step)

    progress = fit(net, signalled, replace(CONFIG, save_every=1e9), tmp_path / "cut")
    assert progress.step == 13 and Checkpoints(tmp_path / "cut/checkpoints").steps() == [13]
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path / "cut")
    assert torch.equal(net.weight, expected)


def test_processes_that_agree_to_stop_still_save_when_the_signal_reaches_them_late():
    """The one that started them is gone; each notices it for itself, up to a second after the first of them."""
    others = SimpleNamespace(any=lambda flag: True)  # another process was told
    with signals.Stop() as stop:
        assert stop.asked(others) and stop.signal is None
        os.kill(os.getpid(), ORPHANED)
        os.kill(os.getpid(), ORPHANED)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    assert signal.getsignal(ORPHANED) is signal.SIG_IGN  # what remains is to write the end
    signal.signal(ORPHANED, signal.SIG_DFL)


@pytest.mark.parametrize("before, after", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_goes_on_without_the_moments_of_the_first(tmp_path, before, after):
    torch.manual_seed(0)
    net = nn.Linear(20, 16)

    def loss_of(step):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        return (net(x) - x[:, :16]).square().mean()

    first = fit(net, loss_of, replace(CONFIG, optimizer=before), tmp_path)
    progress = fit(net, loss_of, replace(CONFIG, optimizer=after, max_steps=60), tmp_path)
    assert progress.step == 60 and progress.loss < first.loss
