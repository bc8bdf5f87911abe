"""The UNet walked block by block: the modules are diffusers', the way through them is ours, so that nothing is computed
twice in a sampling. The locked base and the trainable copy take the same way.

* Keys and values of the prompt are computed once an image (`Text`), time embeddings once a schedule (`embed_time`).
* What lies before the first cross-attention reads no prompt: both halves of the guidance share it. There z has B images
  and the text 2B rows; the batch grows at the first cross-attention.
* Feature maps stay in channels_last between convolutions and attention: no copies from one layout to the other.

Knows of control only that it is added. Letters: B batch, C channels, h w latent, N = h w, T tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from controlnet.model.control.controlnet import Control
    from diffusers import UNet2DConditionModel

BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"}
"""The blocks that this way goes through."""


class Text:
    """c_t (B, T, D), and its keys and values in every cross-attention that has read it."""

    def __init__(self, c_t: Tensor):
        self.c_t = c_t
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keys_values(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Two (B, heads, T, C / heads)."""
        if attention in self._kept:
            return self._kept[attention]
        pair = _keys_values(attention, self.c_t)
        if not torch.is_grad_enabled():  # gradient checkpointing computes everything again, and must find it gone
            self._kept[attention] = pair
        return pair


def embed_time(network: Any, t: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 4C) of timesteps (n,)."""
    return network.time_embedding(network.time_proj(t).to(dtype))


def encode(network: Any, x: Tensor, embedding: Tensor, text: Text, checkpointed: bool = False):
    """The encoding half of a UNet or of its copy, from conv_in's output x (B, C, h, w): a feature for each skip
    connection, x first, and the middle's. embedding is (B, 4C), or (1, 4C) for all."""
    skips = [x]
    for block in network.down_blocks:
        x, outputs = _run(_down, checkpointed, block, x, embedding, text)
        skips += outputs
    return skips, _run(_middle, checkpointed, network.mid_block, x, embedding, text)


def predict(
    unet: UNet2DConditionModel, z: Tensor, embedding: Tensor, text: Text, control: Control | None = None
) -> Tensor:
    """eps_theta(z_t, t, c_t, c_f): the locked base's output, (B, 4, h, w) with as many rows as the text has, control
    added to its skips and middle."""
    checkpointed = torch.is_grad_enabled() and unet.is_gradient_checkpointing
    skips, x = encode(unet, unet.conv_in(z), embedding, text, checkpointed)
    if control is not None:
        skips = [add(skip, residual) for skip, residual in zip(skips, control.down, strict=True)]
        x = add(x, control.middle)
    for block in unet.up_blocks:
        own = [skips.pop() for _ in block.resnets]
        size = skips[-1].shape[-2:] if skips else None  # of the next block; the canvas need not be a power of 2
        x = _run(_up, checkpointed, block, x, own, size, embedding, text)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def denoise(unet: UNet2DConditionModel, z: Tensor, t: Tensor, text: Tensor, control: Control | None = None) -> Tensor:
    """`predict` for z_t (B, 4, h, w) at timesteps t (B,) with c_t (B, T, D), nothing kept."""
    return predict(unet, z, embed_time(unet, t, z.dtype), Text(text), control)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, where one may have a row for both halves of the guidance and the other a row for each."""
    return grow(a, len(b)) + grow(b, len(a))


def grow(x: Tensor, batch: int) -> Tensor:
    """x repeated along its first dimension to at least `batch`."""
    return x if len(x) >= batch else x.repeat(batch // len(x), *[1] * (x.ndim - 1))


def _run(function: Callable, checkpointed: bool, *arguments):
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def _down(block: Any, x: Tensor, embedding: Tensor, text: Text) -> tuple[Tensor, list[Tensor]]:
    outputs = []
    for resnet, attention in zip(block.resnets, _attentions(block), strict=True):
        x = resnet(x, embedding)
        if attention is not None:
            x = _transformer(attention, x, text)
        outputs.append(x)
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
        outputs.append(x)
    return x, outputs


def _middle(block: Any, x: Tensor, embedding: Tensor, text: Text) -> Tensor:
    x = block.resnets[0](x, embedding)
    for resnet, attention in zip(block.resnets[1:], block.attentions, strict=True):
        x = resnet(_transformer(attention, x, text), embedding)
    return x


def _up(block: Any, x: Tensor, skips: list[Tensor], size, embedding: Tensor, text: Text) -> Tensor:
    for resnet, attention, skip in zip(block.resnets, _attentions(block), skips, strict=True):
        x = resnet(torch.cat([grow(x, len(skip)), grow(skip, len(x))], 1), embedding)
        if attention is not None:
            x = _transformer(attention, x, text)
    for upsampler in block.upsamplers or ():
        x = upsampler(x, size)
    return x


def _attentions(block: Any) -> list:
    return list(getattr(block, "attentions", None) or [None] * len(block.resnets))


def _transformer(module: Any, x: Tensor, text: Text) -> Tensor:
    """(B, C, h, w) -> (B', C, h, w), B' the text's batch."""
    tokens = module.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)
    tokens = _project(module.proj_in, tokens)
    for block in module.transformer_blocks:
        normed = block.norm1(tokens)
        tokens = tokens + _attention(block.attn1, normed, *_keys_values(block.attn1, normed))
        tokens = grow(tokens, len(text.c_t))
        tokens = tokens + _attention(block.attn2, block.norm2(tokens), *text.keys_values(block.attn2))
        tokens = tokens + block.ff(block.norm3(tokens))
    tokens = _project(module.proj_out, tokens)
    return grow(x, len(tokens)) + tokens.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def _project(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution as one."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def _attention(module: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x (B, N, C) asks, k and v (B, heads, N or T, C / heads) answer."""
    mixed = F.scaled_dot_product_attention(_heads(module.to_q(x), module.heads), k, v)
    return module.to_out[0](mixed.transpose(1, 2).flatten(2))


def _keys_values(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return _heads(module.to_k(x), module.heads), _heads(module.to_v(x), module.heads)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
