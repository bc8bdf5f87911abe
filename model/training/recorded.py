"""The forward and backward pass of a training step as CUDA graphs.

At small batches a GPU waits for the CPU, which starts some thousand operations in each step; recorded, they are started
at once. One graph for each shape; the optimiser's step is not recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LOG = logging.getLogger(__name__)
KEPT = 8
"""Shapes that are recorded; each graph keeps memory of its own. Further ones run operation by operation."""


class Recorded:
    """`losses(*tensors)` of a network that is trained, recorded at its first call with tensors of a shape; arguments
    may be None. On other devices than CUDA, and where no gradients are asked for, it is the function itself.

    A step may call it once for each shape, and its gradients must be used before the next step: graphs write them to
    the same memory again. `settle` is called before a recording, during which no other thread may use the GPU.
    """

    def __init__(self, trained: nn.Module, losses: Callable[..., Tensor], settle: Callable[[], object] = lambda: None):
        self.trained, self.losses, self.settle = trained, losses, settle
        self.made: dict[tuple, Callable[..., Tensor]] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        tensors = [one for one in arguments if one is not None]
        if not (torch.is_grad_enabled() and tensors[0].is_cuda):
            return self.losses(*arguments)
        key = tuple(None if one is None else (one.shape, one.dtype, one.stride()) for one in arguments)
        if key not in self.made and len(self.made) < KEPT:
            self.made[key] = self._record(arguments)
        return self.made[key](*tensors) if key in self.made else self.losses(*arguments)

    def _record(self, arguments: tuple[Tensor | None, ...]) -> Callable[..., Tensor]:
        part = _OfTensors(self.trained, self.losses, [one is not None for one in arguments])
        samples = tuple(one.clone() for one in arguments if one is not None)
        self.settle()
        try:
            made: Any = torch.cuda.make_graphed_callables(part, samples, allow_unused_input=True)
        except RuntimeError as error:
            LOG.warning("a training step cannot be recorded (%s); it runs operation by operation", str(error)[:200])
            return part
        return made


class _OfTensors(nn.Module):
    """The losses as a module, whose parameters get the gradients, of those arguments that are there."""

    def __init__(self, trained: nn.Module, losses: Callable[..., Tensor], there: list[bool]):
        super().__init__()
        self.trained, self.losses, self.there = trained, losses, there

    def forward(self, *tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return self.losses(*(next(rest) if one else None for one in self.there))
