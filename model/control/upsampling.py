"""Upsampling and the convolution after it as one: a transposed convolution has less than half of the products.

Each pixel that nearest-neighbour upsampling repeats four times meets the nine weights of a 3x3 convolution; those that
meet the same pixel are added up beforehand, which leaves 4 weights of 9 for each pixel of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_kept = WeakTensorKeyDictionary()
"""By the plain weight: its version, and the folded one."""


class FoldedUpsample(Upsample2D):
    """diffusers' layer, quicker where its weights are locked. Same parameters, same result up to rounding."""

    conv: nn.Conv2d
    constant: Tensor | None = None
    """The folded weight that compiled graphs hold (`fold_for_graphs`)."""

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "constant"}  # a copy folds its own

    def forward(self, x: Tensor, output_size=None, *more, **others) -> Tensor:
        """(B, C, h, w) -> (B, C', 2h, 2w), or of another `output_size`, which is then reached as diffusers does."""
        doubled = [2 * side for side in x.shape[-2:]]
        weight = self.conv.weight
        if weight.requires_grad or torch.is_grad_enabled() or list(output_size or doubled) != doubled:
            return super().forward(x, output_size, *more, **others)
        if torch.compiler.is_compiling():
            weight = _fold(weight) if self.constant is None else self.constant
        else:
            weight = folded(weight)
        return F.conv_transpose2d(x, weight, self.conv.bias, stride=2, padding=1)


def folded(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (C, C', 4, 4), the weight of the transposed convolution. Computed once for a locked weight."""
    now = weight._version, weight.dtype, weight.device  # `Module.to` changes the latter two and no version
    before, known = _kept.get(weight, (None, None))
    if before != now:
        layout = (
            torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        known = _fold(weight).contiguous(memory_format=layout)
        _kept[weight] = now, known
    return known


def _fold(weight: Tensor) -> Tensor:
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _added(_added(exact, 2), 3).transpose(0, 1).to(weight.dtype)


def _added(weight: Tensor, side: int) -> Tensor:
    """The 3 weights of a column (or row) as the 4 of the transposed convolution. No constant is copied to the device:
    a CUDA graph could not be recorded."""
    first, middle, last = weight.unbind(side)
    return torch.stack([last, middle + last, first + middle, first], side)


def fold_upsampling(network: nn.Module) -> None:
    """Make every upsampler of a network a FoldedUpsample, in place, if it is of the usual kind."""
    for module in network.modules():
        if type(module) is Upsample2D and _is_usual(module):
            module.__class__ = FoldedUpsample


def fold_for_graphs(network: nn.Module) -> None:
    """Fold the weights of a network now, so that a graph that is compiled of it does not do so in each evaluation. The
    graph keeps the weights that the network has now."""
    for module in network.modules():
        if isinstance(module, FoldedUpsample) and not module.conv.weight.requires_grad:
            module.constant = folded(module.conv.weight)


def _is_usual(module: Upsample2D) -> bool:
    """Whether it doubles by repeating pixels, and then has a 3x3 convolution."""
    if not (module.use_conv and module.interpolate and module.name == "conv") or module.norm is not None:
        return False
    return module.conv.kernel_size == (3, 3) and module.conv.padding == (1, 1)
