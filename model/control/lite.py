"""The paper's ablations (section 4.2, Fig. 8): a ControlNet without its copy (lite), or without zero convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from controlnet.model.control.controlnet import ControlNet, halvings, skip_channels
from controlnet.model.control.hint import SD_WIDTHS, gaussian_
from controlnet.model.control.prompt import Prompt
from torch import Tensor, nn


class ControlNetLite(ControlNet):
    """One 3x3 convolution per skip connection, and one for the middle, in place of the trainable copy's blocks.

    It reads z_t and the condition, but neither timestep nor text. Only this project reads its files (their config has
    `copy: lite`).
    """

    def __init__(self, parts: Any, hint: str = "released", hint_widths: Sequence[int] = SD_WIDTHS):
        """parts: anything with a UNet2DConditionModel's conv_in and config."""
        nn.Module.__init__(self)
        config = dict(parts.config) | {"copy": "lite"}
        channels = skip_channels(config)
        self.conv_in = parts.conv_in
        self.down_blocks = nn.ModuleList()
        for narrow, wide, halves in zip(channels, channels[1:], halvings(config), strict=False):
            self.down_blocks.append(nn.Conv2d(narrow, wide, 3, stride=2 if halves else 1, padding=1))
        self.mid_block = nn.Conv2d(channels[-1], channels[-1], 3, padding=1)
        for convolution in (*self.down_blocks, self.mid_block):
            gaussian_(convolution)
        self.add_new(config, hint, hint_widths)

    def begin(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """An empty tensor (n, 0): this network does not depend on time."""
        return times.new_empty((len(times), 0), dtype=dtype)

    def features(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Tensor) -> tuple[list[Tensor], Tensor]:
        skips = [self.conv_in(z) + feature]
        for convolution in self.down_blocks:
            skips.append(F.silu(convolution(skips[-1])))
        return skips, F.silu(self.mid_block(skips[-1]))


def gaussian_convolutions_(controlnet: ControlNet) -> ControlNet:
    """Replace every zero convolution's weights by Gaussian ones, in place: the ControlNet then disturbs the base from
    the first step on."""
    hint = controlnet.controlnet_cond_embedding.get_submodule("conv_out")
    for module in (controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, hint):
        gaussian_(module)
    return controlnet
