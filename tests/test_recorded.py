"""Recorded training steps, with a stand-in for CUDA's graphs: what is recorded, for which shapes, and what is not."""

import pytest
import torch
from controlnet.model.training import recorded
from controlnet.model.training.recorded import Recorded
from torch import nn


@pytest.fixture
def graphs(monkeypatch):
    """As if tensors were on a GPU; graphs own the memory that they read, as CUDA's do. Lists what was recorded."""
    made = []

    def record(part, samples, allow_unused_input):
        assert allow_unused_input and list(part.parameters())
        made.append([tuple(one.shape) for one in samples])

        def replay(*tensors):
            for own, new in zip(samples, tensors, strict=True):
                assert own is not new and own.shape == new.shape
                own.copy_(new)
            return part(*samples)

        return replay

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


def setup():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)

    def losses(x, offset, y):
        return (net(x) + (0 if offset is None else offset) - y).square().mean(1)

    return net, losses


def test_each_shape_is_recorded_once_and_computes_the_same(graphs):
    net, losses = setup()
    settled = []
    step = Recorded(net, losses, lambda: settled.append(len(graphs)))
    for rows in (4, 2, 4, 2):
        x, y = torch.randn(rows, 3), torch.randn(rows, 2)
        expected = torch.autograd.grad(losses(x, None, y).mean(), net.weight)[0]
        torch.testing.assert_close(torch.autograd.grad(step(x, None, y).mean(), net.weight)[0], expected)
    assert graphs == [[(4, 3), (4, 2)], [(2, 3), (2, 2)]]
    step(torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)).sum().backward()
    assert settled == [0, 1, 2]
    assert len(graphs) == 3 and net.weight.grad.any()  # an argument that was None has a graph of its own


def test_what_is_looked_at_only_is_not_recorded(graphs):
    net, losses = setup()
    with torch.no_grad():
        assert Recorded(net, losses)(torch.ones(1, 3), None, torch.ones(1, 2)).shape == (1,)
    assert not graphs


def test_shapes_beyond_the_kept_ones_run_as_they_are(graphs, monkeypatch):
    monkeypatch.setattr(recorded, "KEPT", 2)
    net, losses = setup()
    step = Recorded(net, losses)
    for rows in (1, 2, 3, 4):
        assert step(torch.ones(rows, 3), None, torch.ones(rows, 2)).shape == (rows,)
    assert len(graphs) == 2


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_says_so(graphs, monkeypatch, caplog):
    def refuse(part, samples, allow_unused_input):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    net, losses = setup()
    step, x, y = Recorded(net, losses), torch.ones(2, 3), torch.ones(2, 2)
    assert torch.equal(step(x, None, y), losses(x, None, y)) and torch.equal(step(x, None, y), losses(x, None, y))
    assert caplog.text.count("stream is capturing") == 1


def test_on_a_cpu_it_is_the_function_itself():
    net, losses = setup()
    step, x, y = Recorded(net, losses), torch.ones(2, 3), torch.ones(2, 2)
    assert torch.equal(step(x, None, y), losses(x, None, y)) and not step.made
