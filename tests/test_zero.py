"""The zero convolution and Eq. 2 around any module."""

import pytest
import torch
from controlnet.model.control.zero import ControlledBlock, zero_conv
from torch import nn


def blocks():
    return {
        "convolution": nn.Conv2d(4, 6, 3, padding=1),
        "network": nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 6, 1)),
    }


def test_zero_conv_is_zero_and_keeps_channels():
    conv = zero_conv(5)
    assert conv.weight.shape == (5, 5, 1, 1)
    assert not any(p.any() for p in conv.parameters())
    assert zero_conv(5, 7).weight.shape == (7, 5, 1, 1)


@pytest.mark.parametrize("name", blocks())
def test_gradients_wake_from_the_outside_in(name):
    torch.manual_seed(0)
    block = blocks()[name]
    x, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    encoder = nn.Conv2d(3, 4, 1)
    plain = block(x)
    controlled = ControlledBlock(block, 4, 6)
    optimizer = torch.optim.SGD(
        [*(p for p in controlled.parameters() if p.requires_grad), *encoder.parameters()], lr=0.5
    )
    awake = []
    for _ in range(3):
        y = controlled(x, encoder(condition))
        if not awake:
            assert torch.equal(y, plain)
        optimizer.zero_grad()
        (y - 1).square().sum().backward()
        groups = {"out": controlled.zero_out, "copy": controlled.copy, "in": controlled.zero_in, "encoder": encoder}
        awake.append({n for n, m in groups.items() if all(p.grad is not None and p.grad.any() for p in m.parameters())})
        optimizer.step()
    assert awake == [{"out"}, {"out", "copy", "in"}, {"out", "copy", "in", "encoder"}]
    assert all(p.grad is None for p in controlled.locked.parameters())


def test_formula():
    torch.manual_seed(0)
    block = nn.Conv2d(3, 3, 3, padding=1)
    controlled = ControlledBlock(block, 3)
    for p in controlled.parameters():
        nn.init.normal_(p)
    x, c = torch.randn(1, 3, 5, 5), torch.randn(1, 3, 5, 5)
    expected = controlled.locked(x) + controlled.zero_out(controlled.copy(x + controlled.zero_in(c)))
    torch.testing.assert_close(controlled(x, c), expected)
    assert not torch.allclose(controlled(x, c), controlled(x, -c))
