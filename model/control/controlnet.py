"""The ControlNet of a Stable Diffusion base (paper section 3.2, Fig. 3).

The trainable copy is a deep copy of the base's own conv_in, time embedding, encoding blocks and middle block: none of
diffusers' layers is written again here. Each of its outputs passes a zero convolution and is added to the locked UNet's
skip connection of the same place. Parameter names are those of diffusers' ControlNetModel, so that either program loads
the other's files; `nets.py` does that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from controlnet.model.control.control import Control
from controlnet.model.control.hint import HINT_ENCODERS, SD_WIDTHS
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import embed, embed_times, encode
from controlnet.model.control.zero import zero_conv
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class ControlNet(nn.Module):
    """The trainable copy, its hint encoder and its zero convolutions. Use `from_base` or `nets.load_controlnet`.

    Letters: B batch, C channels, H W pixels, h w latent, T tokens, D text width.
    """

    types: int | None = None
    """How many types of condition it can tell apart; None for a network of one type."""
    hidden = -1.0
    """What it reads where a condition hides the picture (Stable Diffusion 1.5's inpaint network)."""
    conv_in: nn.Module
    down_blocks: nn.ModuleList
    mid_block: nn.Module

    def __init__(self, parts: Any, hint: str = "released", hint_widths: Sequence[int] = SD_WIDTHS):
        """parts: any object with the `copied_parts` of a UNet2DConditionModel and its config. Its modules are used as
        they are, not copied. Raises ValueError for a base with unknown embeddings."""
        super().__init__()
        self.gradient_checkpointing = False
        for name in copied_parts(parts.config):
            self.add_module(name, getattr(parts, name))
        self.add_new(dict(parts.config), hint, hint_widths)

    def add_new(self, config: dict, hint: str, hint_widths: Sequence[int]) -> None:
        """Add what the base does not have: the hint encoder, and a zero convolution for each connection."""
        self.config, self.hint, self.hint_widths = config, hint, tuple(hint_widths)
        channels = skip_channels(config)
        self.controlnet_cond_embedding = HINT_ENCODERS[hint](channels[0], hint_widths)
        self.controlnet_down_blocks = nn.ModuleList(zero_conv(c) for c in channels)
        self.controlnet_mid_block = zero_conv(config["block_out_channels"][-1])

    @classmethod
    def from_base(
        cls, unet: UNet2DConditionModel, hint: str = "released", hint_widths: Sequence[int] = SD_WIDTHS
    ) -> ControlNet:
        """A fresh ControlNet: the base's encoding half copied, everything new at zero. The base stays untouched."""
        copies = {part: copy.deepcopy(getattr(unet, part)) for part in copied_parts(unet.config)}
        return cls(SimpleNamespace(config=unet.config, **copies), hint, hint_widths).requires_grad_(True)

    @property
    def connections(self) -> int:
        """Residuals of a Control: one per skip connection, and the middle's."""
        return len(self.controlnet_down_blocks) + 1

    def prepare(self, condition: Tensor) -> Tensor:
        """The feature c_f (B, C, h, w) of a condition (B, 3, H, W) in [0, 1]. Computed once per image, since it depends
        on neither z_t nor t. Some public networks were trained with red and blue exchanged; their config says so. A
        fourth channel is 1 where the condition is seen, and 0 where it hides the picture."""
        if condition.shape[1] == 4:
            condition, seen = condition[:, :3], condition[:, 3:]
            condition = torch.where(seen > 0.5, condition, self.hidden)
        if self.config.get("controlnet_conditioning_channel_order", "rgb") == "bgr":
            condition = condition.flip(1)
        return self.controlnet_cond_embedding(condition)

    def join(self, features: Sequence[Tensor], types: Sequence[int], scales: Sequence[float]) -> Any:
        """What `control` reads of the conditions of one pass: here there is one, and it is its feature."""
        (feature,) = features
        return feature

    def begin(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """The time embeddings (n, 4C) of timesteps (n,)."""
        return embed_times(self, times, dtype)

    def control(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Tensor) -> Control:
        """Control for z_t (B, 4, h, w) at time embeddings (1 or B, 4C), under a prompt and a feature c_f (B, C, h, w).

        This is Eq. 2 for all blocks at once. The hint encoder ends in Z(c; Theta_z1), so the copy F(.; Theta_c) reads
        x + Z(c; Theta_z1). Each output of the copy passes its own zero convolution Z(.; Theta_z2), and the locked UNet
        adds the results to its skip connections (`unet.predict`).
        """
        skips, middle = self.features(z, time, prompt, feature)
        down = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        control = Control(down, self.controlnet_mid_block(middle))
        return control.averaged() if self.averages else control

    @property
    def averages(self) -> bool:
        """Whether its control is averaged over the picture and acts on the half with the prompt alone, as the shuffle
        network's; so it follows a picture's content and not its places."""
        return bool(self.config.get("global_pool_conditions"))

    def features(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Tensor) -> tuple[list[Tensor], Tensor]:
        """The outputs of the trainable copy before the zero convolutions: one per skip connection, and the middle
        block's."""
        return encode(self, self.conv_in(z) + feature, embed(self, time, prompt), prompt, self.gradient_checkpointing)

    def forward(self, z: Tensor, t: Tensor, prompt: Prompt, feature: Tensor) -> Control:
        """`control` for z_t (B, 4, h, w) at timesteps t (B,), as training asks for it."""
        return self.control(z, self.begin(t, z.dtype), prompt, feature)


def copied_parts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a UNet that become the trainable copy. SDXL's added embedding is one of them. Raises ValueError for
    unknown embeddings."""
    added = config.get("addition_embed_type")
    if config.get("class_embed_type") or added not in (None, "text_time"):
        raise ValueError(f"embeddings of {config.get('class_embed_type') or added} are not supported")
    parts = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block")
    return (*parts, "add_time_proj", "add_embedding") if added else parts


def skip_channels(config: dict) -> list[int]:
    """Channels of a UNet's skip connections in order: conv_in, then each layer and down-sampler of each level."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    layers = [layers] * len(widths) if isinstance(layers, int) else layers
    channels = [widths[0]]
    for level, (width, count) in enumerate(zip(widths, layers, strict=True)):
        channels += [width] * (count + (level < len(widths) - 1))
    return channels


def halvings(config: dict) -> list[bool]:
    """For each skip connection after conv_in's: whether it is a down-sampler's, at half the size of the one before."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    halved = []
    for level, count in enumerate([layers] * levels if isinstance(layers, int) else layers):
        halved += [False] * count
        if level < levels - 1:  # the last level has no down-sampler
            halved.append(True)
    return halved
