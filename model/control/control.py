"""Control: what a ControlNet gives to the locked UNet. Several of them are added up (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Control:
    """One residual (B, C, h_i, w_i) per skip connection, conv_in's first, and one for the middle block."""

    down: list[Tensor]
    middle: Tensor

    def __add__(self, other: Control) -> Control:
        """Composition: controls of several networks are added, unweighted."""
        down = [add(a, b) for a, b in zip(self.down, other.down, strict=True)]
        return Control(down, add(self.middle, other.middle))

    def scaled(self, weights: Sequence[float | Tensor] | Tensor) -> Control:
        """Each residual times its weight, in the order down, then middle. A weight is a number or broadcasts to the
        residual's (B, C, h_i, w_i)."""
        *down, middle = weights
        return Control([w * r for w, r in zip(down, self.down, strict=True)], middle * self.middle)

    def zero_in_unconditional_half(self) -> Control:
        """(B, ...) -> (2B, ...): zeros for the unconditional half of the guidance, whose rows come first."""
        return Control([_after_zeros(r) for r in self.down], _after_zeros(self.middle))


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b. If one has B rows, shared by both halves of the guidance, and the other 2B, the shorter is repeated."""
    return grow(a, len(b)) + grow(b, len(a))


def grow(x: Tensor, batch: int) -> Tensor:
    """x with its rows repeated until there are at least `batch`."""
    return x if len(x) >= batch else x.repeat(batch // len(x), *[1] * (x.ndim - 1))


def _after_zeros(residual: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(residual), residual])
