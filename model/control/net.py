"""What sampling and training need from a network that controls: controlnet.py, union.py and lite.py have one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from controlnet.model.control.control import Control
from controlnet.model.control.prompt import Prompt
from torch import Tensor


class Net(Protocol):
    """Letters: B batch, C channels, H W pixels, h w latent."""

    types: int | None
    """How many types of condition it tells apart, and takes in one pass; None for a network of one type."""

    @property
    def connections(self) -> int:
        """Residuals of a Control: one per skip connection, and the middle's."""

    def prepare(self, condition: Tensor) -> Tensor:
        """The feature (B, C, h, w) of a condition (B, 3, H, W) in [0, 1]. Once per image: it depends on
        neither z_t nor t."""

    def join(self, features: Sequence[Tensor], types: Sequence[int], scales: Sequence[float]) -> Any:
        """What `control` reads of the conditions of one pass, each with its type and its scale. The scale of a
        condition alone is not applied here, but to the Control that comes of it."""

    def begin(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network computes from timesteps (n,) alone, (n, ...). Once per schedule."""

    def control(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Any) -> Control:
        """Control for z_t (B, 4, h, w). `time` has one row of `begin`'s result, (1, ...), or one per image, (B, ...).
        The prompt has B rows, or 2B for both halves of the guidance."""
