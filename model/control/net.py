"""What sampling and training need from a network that controls. `controlnet.py` and `lite.py` each have one."""

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
        """What the network computes from timesteps (n,) alone, (n, ...). Once per schedule."""

    def control(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Tensor) -> Control:
        """Control for z_t (B, 4, h, w). `time` has one row of `begin`'s result, (1, ...), or one per image, (B, ...).
        The prompt has B rows, or 2B for both halves of the guidance."""
