"""The union: one ControlNet for several kinds of condition, one or more at a time (github.com/xinsir6/ControlNetPlus).

Hint encoder, copy and zero convolutions are those of a ControlNet. New is how it is told the types of conditions: an
embedding of the set of types is added to the time embedding, and a small network makes an offset of each feature's
channels from a token, which is the mean of the feature plus an embedding of its type.

The released code takes the batch for the sequence in this small network's attention, so images of a batch influence
each other, and conditions do not. Here each image is computed alone, which equals the released network with one image.
Names of parameters are diffusers' (ControlNetUnionModel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.zero import zero_
from diffusers.models.controlnets.controlnet_union import ResidualAttentionBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


@dataclass(frozen=True)
class UnionFeature:
    """What a pass reads of its conditions together: c_f (B, C, h, w) and the embedding of their types (1, 4C)."""

    c_f: Tensor
    types: Tensor


class ControlNetUnion(ControlNet):
    """Letters as in ControlNet. Its config names diffusers' ControlNetUnionModel."""

    hidden = 0.0

    def add_new(self, config: dict[str, Any], hint: str, hint_widths: Sequence[int]) -> None:
        super().add_new(config, hint, hint_widths)
        width, types = config["num_trans_channel"], config["num_control_type"]
        self.types = types
        channels, per_type = config["block_out_channels"][0], config["addition_time_embed_dim"]
        self.task_embedding = nn.Parameter(torch.zeros(types, width))
        blocks = [ResidualAttentionBlock(width, config["num_trans_head"]) for _ in range(config["num_trans_layer"])]
        self.transformer_layes = nn.ModuleList(blocks)
        self.spatial_ch_projs = zero_(nn.Linear(width, config["num_proj_channel"]))
        self.control_type_proj = Timesteps(per_type, config["flip_sin_to_cos"], config["freq_shift"])
        self.control_add_embedding = TimestepEmbedding(per_type * types, 4 * channels)

    def join(self, features: Sequence[Tensor], types: Sequence[int], scales: Sequence[float]) -> UnionFeature:
        """What `control` reads of conditions of these types, with features (B or 1, C, h, w). Several conditions are
        scaled here. One alone is not: its scale multiplies the Control that comes of it, as in the released network."""
        inside = scales if len(features) > 1 else [1.0]
        total: Any = 0
        for feature, type_, scale in zip(features, types, inside, strict=True):
            tokens = scale * (feature.mean((2, 3)) + self.task_embedding[type_])  # (B, C)
            for block in self.transformer_layes:
                tokens = block(tokens[None])[0]  # as B sequences of one token
            offset = self.spatial_ch_projs(tokens)[:, :, None, None]
            total = total + scale * (feature + offset)
        flags = torch.zeros(len(self.task_embedding), device=total.device)
        flags[list(types)] = 1
        embedding = self.control_type_proj(flags).reshape(1, -1)
        return UnionFeature(total, self.control_add_embedding(embedding.to(total.dtype)))

    def features(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Any) -> tuple[list[Tensor], Tensor]:
        return super().features(z, time + feature.types, prompt, feature.c_f)
