"""The forward and backward pass of a training step as CUDA graphs.

At small batches a GPU waits for the CPU, which starts some thousand operations in each step; recorded, they are started
at once. One graph for each shape; the optimiser's step is not recorded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from controlnet.model.work.machine import is_out_of_memory
from controlnet.preprocessors.log import LOG
from torch import Tensor, nn

KEPT = 2
"""Shapes that are recorded; each graph keeps memory of its own. Further ones run operation by operation."""


class Recorded:
    """`losses(*tensors)` of a network that is trained, recorded at its first call with tensors of a shape; arguments
    may be None. On other devices than CUDA, and where no gradients are asked for, it is the function itself.

    Gradients are the memory of a graph, which its next backward pass writes anew: a step may call it once for each
    shape, and must use the gradients before the next step. Added up over several batches they would be wrong.
    `settle` is called before a recording, during which no other thread may use the GPU; `say` if one fails, after which
    nothing is recorded any more.
    """

    def __init__(
        self,
        trained: nn.Module,
        losses: Callable[..., Tensor],
        settle: Callable[[], object] = lambda: None,
        say: Callable[[str], None] = LOG.info,
    ):
        self.trained, self.losses, self.settle, self.say = trained, losses, settle, say
        self.made: dict[tuple, Callable[..., Tensor]] = {}
        self.left = KEPT

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        tensors = [one for one in arguments if one is not None]
        if not (torch.is_grad_enabled() and tensors[0].is_cuda):
            return self.losses(*arguments)
        key = tuple(None if one is None else (one.shape, one.dtype, one.stride()) for one in arguments)
        if key not in self.made and self.left:
            self._record(key, arguments)
        return self.made[key](*tensors) if key in self.made else self.losses(*arguments)

    def _record(self, key: tuple, arguments: tuple[Tensor | None, ...]) -> None:
        self.left -= 1
        part = _OfTensors(self.trained, self.losses, [one is not None for one in arguments])
        samples = tuple(one.clone() for one in arguments if one is not None)
        self.settle()
        stream = torch.cuda.current_stream()
        try:
            made: Any = torch.cuda.make_graphed_callables(part, samples, allow_unused_input=True)
            self.made[key] = made
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the one on which it recorded only if all went well
            self.left = 0
            if is_out_of_memory(error):  # without graphs there may be enough
                self.made.clear()
                gc.collect()
                torch.cuda.empty_cache()
            told = str(error).partition("\n")[0]
            self.say(f"warning: a training step cannot be recorded ({told}); it runs operation by operation")


class _OfTensors(nn.Module):
    """The losses as a module, whose parameters get the gradients, of those arguments that are there."""

    def __init__(self, trained: nn.Module, losses: Callable[..., Tensor], there: list[bool]):
        super().__init__()
        self.trained, self.losses, self.there = trained, losses, there

    def forward(self, *tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return self.losses(*(next(rest) if one else None for one in self.there))
