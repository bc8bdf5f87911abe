"""The ControlNet of a Stable Diffusion base (paper section 3.2, Fig. 3).

The trainable copy is a deep copy of the base's own conv_in, time embedding, encoding blocks and middle block: none of
diffusers' layers is written again here. Each of its outputs passes a zero convolution and is added to the locked UNet's
skip connection of the same place. Parameter names are those of diffusers' ControlNetModel, so that either program loads
the other's files; `nets.py` does that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from controlnet.model.control.hint import HINT_ENCODERS, SD_WIDTHS
from controlnet.model.control.unet import Text, add, embed_time, encode
from controlnet.model.control.zero import zero_conv
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


@dataclass
class Control:
    """One residual per skip connection, conv_in's first, and one for the middle block."""

    down: list[Tensor]
    middle: Tensor

    def __add__(self, other: Control) -> Control:
        """Composition: controls of several ControlNets are added, unweighted (paper 3.5)."""
        return Control([add(*pair) for pair in zip(self.down, other.down, strict=True)], add(self.middle, other.middle))

    def scaled(self, weights: Sequence[float | Tensor] | Tensor) -> Control:
        """Each residual times its weight, in the order down, then middle. A weight is a number or broadcasts to the
        residual's (B, C, h, w)."""
        *down, middle = weights
        return Control([w * r for w, r in zip(down, self.down, strict=True)], middle * self.middle)


class ControlNet(nn.Module):
    """The trainable copy, its hint encoder and its zero convolutions. Use `from_base` or `checkpoint.load_controlnet`.

    Letters: B batch, C channels, H W pixels, h w latent, T tokens, D text width.
    """

    def __init__(self, encoder: Any, hint: str = "released", hint_widths: Sequence[int] = SD_WIDTHS):
        """encoder: anything with a UNet2DConditionModel's conv_in, time_proj, time_embedding, down_blocks, mid_block
        and config; its modules are taken, not copied. Raises ValueError for a base with extra embeddings (SDXL)."""
        super().__init__()
        config = encoder.config
        if config.get("addition_embed_type") or config.get("class_embed_type"):
            raise ValueError("bases with added or class embeddings (such as SDXL) are not supported")
        self.config = dict(config)
        self.hint, self.hint_widths = hint, tuple(hint_widths)
        self.gradient_checkpointing = False
        self.conv_in = encoder.conv_in
        self.time_proj = encoder.time_proj
        self.time_embedding = encoder.time_embedding
        self.down_blocks = encoder.down_blocks
        self.mid_block = encoder.mid_block
        channels = skip_channels(config)
        self.controlnet_cond_embedding = HINT_ENCODERS[hint](channels[0], hint_widths)
        self.controlnet_down_blocks = nn.ModuleList(zero_conv(c) for c in channels)
        self.controlnet_mid_block = zero_conv(config["block_out_channels"][-1])

    @classmethod
    def from_base(
        cls, unet: UNet2DConditionModel, hint: str = "released", hint_widths: Sequence[int] = SD_WIDTHS
    ) -> ControlNet:
        """A fresh ControlNet: the base's encoding half copied, everything new at zero. The base stays untouched."""
        parts = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block")
        copies = {part: copy.deepcopy(getattr(unet, part)) for part in parts}
        return cls(SimpleNamespace(config=unet.config, **copies), hint, hint_widths).requires_grad_(True)

    def encode_hint(self, condition: Tensor) -> Tensor:
        """c_f (B, C, h, w) of a condition (B, 3, H, W) in [0, 1]. Once an image: it depends on neither z_t nor t. Some
        public networks say in their config that they were trained on maps with red and blue exchanged."""
        if self.config.get("controlnet_conditioning_channel_order", "rgb") == "bgr":
            condition = condition.flip(1)
        return self.controlnet_cond_embedding(condition)

    def forward(self, z: Tensor, t: Tensor, text: Tensor, hint: Tensor) -> Control:
        """Control for z_t (B, 4, h, w) at timesteps t (B,) with text c_t (B, T, D) and hint c_f (B, C, h, w)."""
        return self.control(z, embed_time(self, t, z.dtype), Text(text), hint)

    def control(self, z: Tensor, embedding: Tensor, text: Text, hint: Tensor) -> Control:
        """The same with a time embedding (B or 1, 4C) and a text that keeps its keys and values."""
        skips, x = self.encode(z, embedding, text, hint)
        down = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return Control(down, self.controlnet_mid_block(x))

    def encode(self, z: Tensor, embedding: Tensor, text: Text, hint: Tensor) -> tuple[list[Tensor], Tensor]:
        """The trainable copy's features, before the zero convolutions: one per skip connection, and the middle's."""
        return encode(self, self.conv_in(z) + hint, embedding, text, self.gradient_checkpointing)


def skip_channels(config: dict) -> list[int]:
    """Channels of a UNet's skip connections in order: conv_in, then each layer and down-sampler of each level."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    layers = [layers] * len(widths) if isinstance(layers, int) else layers
    channels = [widths[0]]
    for level, (width, count) in enumerate(zip(widths, layers, strict=True)):
        channels += [width] * (count + (level < len(widths) - 1))
    return channels
