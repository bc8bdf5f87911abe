"""The paper's idea: the zero convolution and the block that it makes (section 3.1, Eq. 2).

    y_c = F(x; Theta) + Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)

Both convolutions Z start at zero, so at step 0 y_c equals y exactly: training cannot begin by harming the base. At that
step only Theta_z2 has a gradient; after one optimiser step Theta_c and Theta_z1 have one too, and after two steps so
has the network that computes c.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def zero_conv(channels_in: int, channels_out: int | None = None) -> nn.Conv2d:
    """A 1x1 convolution with weight and bias zero. `channels_out` defaults to `channels_in`."""
    return zero_(nn.Conv2d(channels_in, channels_in if channels_out is None else channels_out, kernel_size=1))


def zero_(module: M) -> M:
    """Set every parameter of a module to zero, in place, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ControlledBlock(nn.Module):
    """Eq. 2 around any block F that maps features (B, C, H, W) to features (B, C', H', W').

    `locked` is the block itself, frozen; `copy` its trainable copy. The condition c has the shape of x.
    """

    def __init__(self, block: nn.Module, channels_in: int, channels_out: int | None = None):
        super().__init__()
        self.copy = copy.deepcopy(block).requires_grad_(True)
        self.locked = block.requires_grad_(False)
        self.zero_in = zero_conv(channels_in)  # Theta_z1
        self.zero_out = zero_conv(channels_in if channels_out is None else channels_out)  # Theta_z2

    def forward(self, x: Tensor, c: Tensor, *args, **kwargs) -> Tensor:
        y = self.locked(x, *args, **kwargs)
        return y + self.zero_out(self.copy(x + self.zero_in(c), *args, **kwargs))
