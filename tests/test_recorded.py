"""Recorded training steps, with a stand-in for CUDA's graphs: what is recorded, for which shapes, and what is not."""

import pytest
import torch
from controlnet.model.training.config import TrainConfig
from controlnet.model.training.parallel import Parallel
from controlnet.model.training.recorded import KEPT, Recorded
from controlnet.model.training.run import can_be_recorded
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
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "usual")
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
    step.left = 3
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


def test_shapes_beyond_the_kept_ones_run_as_they_are(graphs):
    net, losses = setup()
    step = Recorded(net, losses)
    for rows in (1, 2, 3, 4):
        assert step(torch.ones(rows, 3), None, torch.ones(rows, 2)).shape == (rows,)
    assert len(graphs) == KEPT


@pytest.mark.parametrize("reason", ["operation not permitted when stream is capturing", "CUDA out of memory"])
def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_says_so(graphs, monkeypatch, reason):
    """And nothing is recorded after that, on the stream of before; without memory, earlier graphs are given up."""

    def refuse(part, samples, allow_unused_input):
        raise RuntimeError(reason + "\nand more")

    net, losses = setup()
    said, streams = [], []
    step, x, y = Recorded(net, losses, say=said.append), torch.ones(2, 3), torch.ones(2, 2)
    step(x, None, y)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    for rows in (1, 1, 3):
        x, y = torch.ones(rows, 3), torch.ones(rows, 2)
        assert torch.equal(step(x, None, y), losses(x, None, y))
    assert said == [f"warning: a training step cannot be recorded ({reason}); it runs operation by operation"]
    assert streams == ["usual"] and len(step.made) == ("memory" not in reason)


def test_on_a_cpu_it_is_the_function_itself():
    net, losses = setup()
    step, x, y = Recorded(net, losses), torch.ones(2, 3), torch.ones(2, 2)
    assert torch.equal(step(x, None, y), losses(x, None, y)) and not step.made


@pytest.mark.parametrize("change", [{"accumulation": 2}, {"buckets": True}, {"gradient_checkpointing": True}])
def test_steps_of_several_passes_are_not_recorded(change):
    """Gradients of several batches would be added up in a graph's own memory."""
    alone = Parallel(torch.device("cpu"))
    assert can_be_recorded(TrainConfig(), alone) and not can_be_recorded(TrainConfig(**change), alone)
