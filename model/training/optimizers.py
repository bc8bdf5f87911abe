"""The optimisers of training: AdamW, the same with moments in 8 bits, and Muon, which learns faster per step (Jordan et
al. 2024, kellerjordan.github.io/posts/muon). Muon takes AdamW's learning rates by the rule of Liu et al. 2025 (arXiv
2502.16982, 2.2)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from controlnet.preprocessors.errors import UsageError
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
BETAS = (0.9, 0.99)
MOMENTUM = 0.95
SMALLEST = 16
"""Matrices with fewer rows or columns (the first and last convolutions, say) are left to AdamW."""


def make_optimizer(module: nn.Module, name: str, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser with this name (OPTIMIZERS), for a module's parameters that require gradients. Raises UsageError if
    the package that it needs is missing."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": learning_rate, "betas": BETAS, "weight_decay": weight_decay, "fused": True}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if name == "adamw8bit":
        del options["fused"]
        return adamw_of_8_bits()(parameters, **options)
    matrices = [p for p in parameters if p.ndim in (2, 4) and min(_matrix(p).shape) >= SMALLEST]
    return Muon(parameters, matrices, **options)


def adamw_of_8_bits() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW, whose moments take 2 bytes per parameter in place of 8 (Dettmers et al. 2021, arXiv
    2110.02861); tensors under 4096 numbers keep theirs in float32. Raises UsageError if it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UsageError(
            "optimizer=adamw8bit needs bitsandbytes, which is not installed", "pip install 'controlnet-toolkit[8bit]'"
        ) from None
    return AdamW8bit


class Muon(torch.optim.AdamW):
    """AdamW, but the parameters in `matrices`, (M, N) or convolutions (M, N, h, w), move by their momentum with all
    singular values made about equal. One learning rate serves both, since updates have the size of AdamW's."""

    def __init__(self, parameters: list[nn.Parameter], matrices: list[nn.Parameter], **options: Any):
        super().__init__(parameters, **options)
        self.matrices = matrices
        # The fused kernel skips a step whose scaled gradients overflow by itself; matrices would not.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in self.matrices:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p] |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}
            alike[p.shape].append(p)
        # All matrices of a shape at once: one at a time, a GPU would wait for the program.
        for parameters in alike.values():
            momenta: list[Tensor] = [self.state[p]["exp_avg"] for p in parameters]
            gradients: Any = [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = torch.stack([_matrix(u) for u in torch._foreach_lerp(gradients, momenta, MOMENTUM)])
            rate = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
            moves = rate * orthogonal(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            shaped: Any = [_shaped(move, p) for move, p in zip(moves, parameters, strict=True)]
            torch._foreach_sub_(parameters, shaped)
            for parameter in parameters:
                parameter.grad = None  # so that AdamW skips it
        super().step()


def _matrix(p: Tensor) -> Tensor:
    """(M, N) as it is; a convolution (M, N, h, w) as (M, h w N)."""
    return p.permute(0, 2, 3, 1).flatten(1) if p.ndim == 4 else p


def _shaped(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_matrix`."""
    if like.ndim == 2:
        return matrix
    _, columns, height, width = like.shape
    return matrix.unflatten(1, (height, width, columns)).permute(0, 3, 1, 2)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (K, M, N) with the same singular vectors and singular values of about 0.7 to 1.2: a Newton-Schulz
    iteration in bfloat16, with Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
