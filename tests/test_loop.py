"""The training loop: it learns, resumes exactly, and never leaves half a checkpoint."""

import pytest
import torch
from controlnet.model.loop import LoopConfig, fit
from torch import nn

CONFIG = LoopConfig(max_steps=30, learning_rate=1e-2, warmup_steps=3, log_every=5, save_every=1e-9)


def setup():
    torch.manual_seed(0)
    net = nn.Linear(4, 2)

    def loss_of(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (net(x) - x[:, :2]).square().mean()

    return net, loss_of


def test_it_learns_and_logs(tmp_path):
    net, loss_of = setup()
    logged = []
    progress = fit(net, loss_of, CONFIG, tmp_path, print, lambda p: logged.append((p.step, p.loss)))
    assert progress.step == 30
    assert [s for s, _ in logged] == [5, 10, 15, 20, 25, 30] and logged[-1][1] < 0.7 * logged[0][1]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7, 29])
def test_interrupted_and_resumed_is_the_same_run(tmp_path, at):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path / "whole", print)
    expected = [p.clone() for p in net.parameters()]

    net, loss_of = setup()

    def failing(step):
        if step == at:
            raise Stop
        return loss_of(step)

    with pytest.raises(Stop):
        fit(net, failing, CONFIG, tmp_path / "cut", print)
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path / "cut", print)
    assert all(torch.equal(a, b) for a, b in zip(expected, net.parameters(), strict=True))
    assert [p.name for p in (tmp_path / "cut").iterdir() if p.suffix == ".tmp"] == []


def test_a_finished_run_is_not_run_again(tmp_path):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path, print)
    expected = [p.clone() for p in net.parameters()]
    net, _ = setup()
    fit(net, lambda step: pytest.fail("ran"), CONFIG, tmp_path, print)
    assert all(torch.equal(a, b) for a, b in zip(expected, net.parameters(), strict=True))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    net, loss_of = setup()
    fit(net, loss_of, CONFIG, tmp_path, print)
    before = (tmp_path / "state.pt").read_bytes()

    def full(obj, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError):
        fit(net, loss_of, LoopConfig(max_steps=40, save_every=1e-9), tmp_path, print)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    net, loss_of = setup()
    with pytest.raises(FloatingPointError, match="step 10"):
        fit(net, lambda s: loss_of(s) * (float("nan") if s > 6 else 1), CONFIG, tmp_path, print)


def test_only_trainable_parameters_move(tmp_path):
    net, loss_of = setup()
    net.bias.requires_grad_(False)
    before = net.bias.clone()
    fit(net, loss_of, CONFIG, tmp_path, print)
    assert torch.equal(net.bias, before)


@pytest.mark.parametrize("field", ["max_steps", "minutes", "learning_rate"])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=field):
        LoopConfig(**{field: -1})
