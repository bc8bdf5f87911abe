"""The T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): a small network beside ControlNet that controls the same base.

It reads the condition alone, neither z_t nor t nor the prompt, so it runs once an image. What it gives is added inside
the base's encoder, to what each of its blocks gives on. The network is diffusers' T2IAdapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from controlnet.model.control.control import Control
from controlnet.model.control.prompt import Prompt
from diffusers import T2IAdapter
from torch import Tensor


class T2INet(T2IAdapter):
    """Letters as in ControlNet. The residuals of its Control are `inner`, one for each block of the encoder."""

    types: int | None = None
    averages = False

    @property
    def connections(self) -> int:
        return connections_of(dict(self.config))

    def prepare(self, condition: Tensor) -> list[Tensor]:
        """The features (B, C, h_i, w_i) of a condition (B, 3, H, W) in [0, 1], one for each connection. Where a fourth
        channel hides it, it is black."""
        if condition.shape[1] == 4:
            condition = condition[:, :3] * (condition[:, 3:] > 0.5)
        if self.config["in_channels"] == 1:  # those of edges and sketches read grey
            condition = condition[:, :3].mean(1, keepdim=True)
        step = self.config["downscale_factor"]
        right, below = (-side % step for side in (condition.shape[-1], condition.shape[-2]))
        if right or below:
            condition = F.pad(condition, (0, right, 0, below), mode="replicate")
        return self(condition[:, : self.config["in_channels"]])

    def join(self, features: Sequence[Any], types: Sequence[int], scales: Sequence[float]) -> Any:
        (feature,) = features
        return feature

    def begin(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(times), 1, dtype=dtype, device=times.device)

    def control(self, z: Tensor, time: Tensor, prompt: Prompt, feature: list[Tensor]) -> Control:
        return Control([], None, feature)


def connections_of(config: dict[str, Any]) -> int:
    """How many features a T2I-Adapter with this config gives."""
    return len(config["channels"]) + (config.get("adapter_type") == "light_adapter")
