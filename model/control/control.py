"""Control: what a ControlNet gives to the locked UNet. Several of them are added up (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Control:
    """One residual (B, C, h_i, w_i) per skip connection, conv_in's first, and one for the middle block. A T2I-Adapter
    has others in their place."""

    down: list[Tensor]
    middle: Tensor | None
    inner: list[Tensor] = field(default_factory=list)
    """Residuals inside of the encoder: for what each of its blocks gives on, and one more for the middle block's."""

    @property
    def residuals(self) -> list[Tensor]:
        """All of them: down, middle, inner."""
        return [*self.down, *([] if self.middle is None else [self.middle]), *self.inner]

    def __add__(self, other: Control) -> Control:
        """Composition: controls of several networks are added, unweighted."""
        middle = _sums(*([] if one.middle is None else [one.middle] for one in (self, other)))
        return Control(_sums(self.down, other.down), middle[0] if middle else None, _sums(self.inner, other.inner))

    def map(self, function: Callable[[Tensor], Tensor]) -> Control:
        """With a function applied to each residual."""
        return self._of([function(residual) for residual in self.residuals])

    def scaled(self, weights: Sequence[float | Tensor] | Tensor) -> Control:
        """Each residual times its weight, in the order of `residuals`. A weight is a number or broadcasts to the
        residual's (B, C, h_i, w_i)."""
        return self._of([weight * residual for weight, residual in zip(weights, self.residuals, strict=True)])

    def _of(self, residuals: list[Tensor]) -> Control:
        n = len(self.down)
        middle = 0 if self.middle is None else 1
        return Control(residuals[:n], residuals[n] if middle else None, residuals[n + middle :])

    def averaged(self) -> Control:
        """Each residual as its mean over the picture, the same at every place of it."""
        return self.map(lambda residual: residual.mean((2, 3), keepdim=True).expand_as(residual))

    def zero_in_unconditional_half(self) -> Control:
        """(B, ...) -> (2B, ...): zeros for the unconditional half of the guidance, whose rows come first."""
        return self.map(_after_zeros)


def _sums(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Sums of two lists, of which one may be empty."""
    return [add(x, y) for x, y in zip(a, b, strict=True)] if a and b else a or b


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b. If one has B rows, shared by both halves of the guidance, and the other 2B, the shorter is repeated."""
    return grow(a, len(b)) + grow(b, len(a))


def grow(x: Tensor, batch: int) -> Tensor:
    """x with its rows repeated until there are at least `batch`."""
    return x if len(x) >= batch else x.repeat(batch // len(x), *[1] * (x.ndim - 1))


def _after_zeros(residual: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(residual), residual])
