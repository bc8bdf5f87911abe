"""The walk through the UNet, block by block: diffusers' modules, called in our own order, so that sampling computes
nothing twice. The locked base and the trainable copy are walked in the same way.

* Keys and values of the prompt are computed once per image (`Prompt`), time embeddings once per schedule
  (`embed_times`).
* Both halves of the guidance share everything before the first cross-attention, because it does not read the prompt.
  So z_t has B rows, one per image, while the prompt has 2B, the unconditional half first. At the first cross-attention
  the features grow to 2B rows (`grow`); earlier skips are repeated when they are joined or added.
* Feature maps stay in channels_last between convolutions and attention, so no copies from one layout to the other.

All it does with control is to add it. Letters: B batch, C channels, h w latent, N = h w, T tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from controlnet.model.control.attention import attend
from controlnet.model.control.control import Control, add, grow
from controlnet.model.control.prompt import Prompt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"}
"""The blocks that can be walked."""


def embed_times(network: Any, times: Tensor, dtype: torch.dtype) -> Tensor:
    """The time embedding (n, 4C) of timesteps (n,), once per schedule."""
    return network.time_embedding(network.time_proj(times).to(dtype))


def embed(network: Any, time: Tensor, prompt: Prompt) -> Tensor:
    """The embedding that every block reads, (1 or B, 4C): the time embedding, plus the added embedding of pooled text
    and ids in families that have one (SDXL)."""
    if prompt.pooled is None or prompt.ids is None:
        return time
    ids = network.add_time_proj(prompt.ids.flatten()).reshape(len(prompt), -1)  # (B, 6 x 256)
    return time + network.add_embedding(torch.cat([prompt.pooled, ids.to(prompt.pooled)], 1))


def encode(
    network: Any,
    x: Tensor,
    embedding: Tensor,
    prompt: Prompt,
    checkpointed: bool = False,
    inner: Sequence[Tensor] = (),
):
    """The encoding half of a UNet or of its copy, from conv_in's output x (B, C, h, w). Returns a feature per skip
    connection, x first, and the middle block's. `embedding` is (B, 4C), or (1, 4C) for all rows. `inner` is added to
    what the blocks give on (see Control)."""
    skips = [x]
    x = grow(x, len(embedding))  # where pooled text is in the embedding, the halves part here already
    for block, more in zip_longest(network.down_blocks, inner[: len(network.down_blocks)]):
        x, outputs = _run(_down, checkpointed, block, x, embedding, prompt, more)
        skips += outputs
    x = _run(_middle, checkpointed, network.mid_block, x, embedding, prompt)
    for more in inner[len(network.down_blocks) :]:
        x = add(x, more) if more.shape[1:] == x.shape[1:] else x
    return skips, x


def predict(
    unet: UNet2DConditionModel, z: Tensor, time: Tensor, prompt: Prompt, control: Control | None = None
) -> Tensor:
    """eps_theta(z_t, t, c_t, c_f), (B, 4, h, w): the output of the locked base with control added to its skips and its
    middle. It has as many rows as the prompt. `time` is (1 or B, 4C), from `embed_times`."""
    checkpointed = torch.is_grad_enabled() and unet.is_gradient_checkpointing
    embedding = embed(unet, time, prompt)
    skips, x = encode(unet, unet.conv_in(z), embedding, prompt, checkpointed, control.inner if control else ())
    if control is not None and control.middle is not None:
        skips = [add(skip, residual) for skip, residual in zip(skips, control.down, strict=True)]
        x = add(x, control.middle)
    for block in unet.up_blocks:
        own = [skips.pop() for _ in block.resnets]
        size = skips[-1].shape[-2:] if skips else None  # of the next block; the canvas need not be a power of 2
        x = _run(_up, checkpointed, block, x, own, size, embedding, prompt)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def read_prompt(network: Any, prompt: Prompt) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of all cross-attentions, in the order in which the walk reads them."""
    blocks = [*network.down_blocks, network.mid_block, *getattr(network, "up_blocks", ())]
    attentions = [attention for block in blocks for attention in getattr(block, "attentions", None) or ()]
    return [prompt.keys_values(one.attn2, _keys_values) for two in attentions for one in two.transformer_blocks]


def denoise(unet: UNet2DConditionModel, z: Tensor, t: Tensor, prompt: Prompt, control: Control | None = None) -> Tensor:
    """`predict` for z_t (B, 4, h, w) at timesteps t (B,), without a schedule."""
    return predict(unet, z, embed_times(unet, t, z.dtype), prompt, control)


def _run(function: Callable, checkpointed: bool, *arguments):
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def _down(
    block: Any, x: Tensor, embedding: Tensor, prompt: Prompt, inner: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """What a block gives on, and its outputs. `inner` is added before the downsampler where there is attention, and
    after it where there is none, as diffusers does (unet_2d_blocks.py, unet_2d_condition.py)."""
    outputs = []
    for resnet, attention in zip(block.resnets, _attentions(block), strict=True):
        x = resnet(x, embedding)
        if attention is not None:
            x = _transformer(attention, x, prompt)
        outputs.append(x)
    attends = _attentions(block)[0] is not None
    if inner is not None and attends:
        outputs[-1] = x = add(x, inner)
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
        outputs.append(x)
    if inner is not None and not attends:
        outputs[-1] = x = add(x, inner)
    return x, outputs


def _middle(block: Any, x: Tensor, embedding: Tensor, prompt: Prompt) -> Tensor:
    x = block.resnets[0](x, embedding)
    for resnet, attention in zip(block.resnets[1:], block.attentions, strict=True):
        x = resnet(_transformer(attention, x, prompt), embedding)
    return x


def _up(block: Any, x: Tensor, skips: list[Tensor], size, embedding: Tensor, prompt: Prompt) -> Tensor:
    for resnet, attention, skip in zip(block.resnets, _attentions(block), skips, strict=True):
        x = resnet(torch.cat([grow(x, len(skip)), grow(skip, len(x))], 1), embedding)
        if attention is not None:
            x = _transformer(attention, x, prompt)
    for upsampler in block.upsamplers or ():
        x = upsampler(x, size)
    return x


def _attentions(block: Any) -> list:
    attentions = getattr(block, "attentions", None)
    return [None] * len(block.resnets) if attentions is None else list(attentions)


def _transformer(module: Any, x: Tensor, prompt: Prompt) -> Tensor:
    """(B, C, h, w) -> (B', C, h, w), where B' is the number of the prompt's rows."""
    tokens = _to_tokens(module, module.norm(x))  # (B, N, C)
    for block in module.transformer_blocks:
        normed = block.norm1(tokens)
        tokens = tokens + _attention(block.attn1, normed, *_keys_values(block.attn1, normed))
        tokens = grow(tokens, len(prompt))  # (B', N, C): from here on the prompt is read
        tokens = tokens + _attention(block.attn2, block.norm2(tokens), *prompt.keys_values(block.attn2, _keys_values))
        tokens = tokens + block.ff(block.norm3(tokens))
    return grow(x, len(tokens)) + _to_features(module, tokens, x.shape[-2:])


def _to_tokens(module: Any, x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C), through proj_in: a linear layer, or a 1x1 convolution."""
    if module.use_linear_projection:
        return module.proj_in(x.permute(0, 2, 3, 1).flatten(1, 2))
    return module.proj_in(x).permute(0, 2, 3, 1).flatten(1, 2)


def _to_features(module: Any, tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(B, N, C) -> (B, C, h, w), through proj_out."""
    if module.use_linear_projection:
        return module.proj_out(tokens).unflatten(1, tuple(size)).permute(0, 3, 1, 2)
    return module.proj_out(tokens.unflatten(1, tuple(size)).permute(0, 3, 1, 2))


def _attention(module: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries from x (B, N, C) over k and v (B, heads, N or T, C / heads)."""
    mixed = attend(_heads(module.to_q(x), module.heads), k, v)
    return module.to_out[0](mixed.transpose(1, 2).flatten(2))


def _keys_values(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each (B, heads, N or T, C / heads)."""
    return _heads(module.to_k(x), module.heads), _heads(module.to_v(x), module.heads)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
