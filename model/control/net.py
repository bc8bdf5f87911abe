"""All that sampling and training ask of a network that controls; `controlnet.py` and `lite.py` have one each."""

from __future__ import annotations

from typing import Protocol

import torch
from controlnet.model.control.control import Control
from controlnet.model.control.prompt import Prompt
from torch import Tensor


class Net(Protocol):
    """Letters: B batch, C channels, H W pixels, h w latent."""

    @property
    def connections(self) -> int:
        """Residuals of a Control: one per skip connection, and the middle's."""

    def prepare(self, condition: Tensor) -> Tensor:
        """The feature (B, C, h, w) of a condition (B, 3, H, W) in [0, 1]. Once per image: it depends on
        neither z_t nor t."""

    def begin(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """What it needs to know about each of the timesteps (n,), (n, ...): once per schedule."""

    def control(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Tensor) -> Control:
        """Control for z_t (B, 4, h, w) at a row of what `begin` gave, (1, ...), or at a row for each image, (B, ...),
        under a prompt of B rows, or of 2B for both halves of the guidance."""
