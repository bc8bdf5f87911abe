"""Names of tensors in the two layouts: the original single files (github.com/CompVis/stable-diffusion, `ldm`;
github.com/lllyasviel/ControlNet, `cldm`) and diffusers' folders.

Each function returns a table from modules of the original to modules of diffusers, for a network's config in diffusers'
words. The tables are one to one, so the same table converts in both directions. Only names change, except for two kinds
of attention, whose shape changes too: the VAE's has 1x1 convolutions where diffusers has linear layers, and OpenCLIP's
has query, key and value in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Names = dict[str, str]
State = dict[str, Tensor]

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_QKV = ("q_proj", "k_proj", "v_proj")


def unet(config: Mapping) -> Names:
    """The names of a base's UNet, without the prefix `model.diffusion_model.`"""
    names = _encoder(config) | {"out.0": "conv_norm_out", "out.2": "conv_out"}
    i = 0
    for block, kind in enumerate(config["up_block_types"]):
        last = block == len(config["up_block_types"]) - 1
        for layer in range(config["layers_per_block"] + 1):
            names |= _resnet(f"output_blocks.{i}.0", f"up_blocks.{block}.resnets.{layer}")
            if attends := kind.startswith("CrossAttn"):
                names[f"output_blocks.{i}.1"] = f"up_blocks.{block}.attentions.{layer}"
            if layer == config["layers_per_block"] and not last:
                names[f"output_blocks.{i}.{1 + attends}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
            i += 1
    return names


def controlnet(config: Mapping) -> Names:
    """The names of a ControlNet with the released hint encoder, without the prefix `control_model.`"""
    names = _encoder(config)
    connections = len(config["down_block_types"]) * (config["layers_per_block"] + 1)
    names |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(connections)}
    names["middle_block_out.0"] = "controlnet_mid_block"
    hint = ["conv_in", *(f"blocks.{i}" for i in range(2 * len(config["conditioning_embedding_out_channels"]) - 2))]
    hint.append("conv_out")  # a SiLU stands between two convolutions
    return names | {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(hint)}


def vae(config: Mapping) -> Names:
    """The names of a base's VAE, without the prefix `first_stage_model.`"""
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    count = len(config["block_out_channels"])
    for half, more in (("encoder", 0), ("decoder", 1)):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for block in range(count):
            own = f"down.{block}" if half == "encoder" else f"up.{count - 1 - block}"  # the original counts from below
            way = "down" if half == "encoder" else "up"
            for layer in range(config["layers_per_block"] + more):
                names |= _vae_resnet(f"{half}.{own}.block.{layer}", f"{half}.{way}_blocks.{block}.resnets.{layer}")
            if block < count - 1:
                names[f"{half}.{own}.{way}sample.conv"] = f"{half}.{way}_blocks.{block}.{way}samplers.0.conv"
        for i in (0, 1):
            names |= _vae_resnet(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}")
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        names |= {f"{half}.mid.attn_1.{a}": f"{half}.mid_block.attentions.0.{b}" for a, b in attention.items()}
    return names


def open_clip(config: Mapping) -> Names:
    """The names of an OpenCLIP text encoder, with query, key and value already split."""
    names = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    for i in range(config["num_hidden_layers"]):
        own, other = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        names |= {f"{own}.{a}": f"{other}.{b}" for a, b in _LAYER.items()}
        names |= {f"{own}.attn.{name}": f"{other}.self_attn.{name}" for name in _QKV}
    return names


def rename(state: State, names: Names) -> State:
    """The tensors under their new names. A tensor is left out if neither its module nor one around it is in the
    table."""
    found = {name: renamed(name, names) for name in state}
    return {new: state[name] for name, new in found.items() if new is not None}


def renamed(name: str, names: Names) -> str | None:
    """The new name of a tensor or module; None if neither it nor a module around it is in the table."""
    module, rest = name, ""
    while module not in names and "." in module:
        module, _, end = module.rpartition(".")
        rest = f".{end}{rest}"
    return names[module] + rest if module in names else None


def reverse(names: Names) -> Names:
    return {b: a for a, b in names.items()}


def linear_attention(state: State) -> State:
    """The state of a VAE with the weights of its attention as linear layers: (C, C, 1, 1) -> (C, C)."""
    return {k: t[:, :, 0, 0] if _is_attention(k) and t.ndim == 4 else t for k, t in state.items()}


def convolution_attention(state: State) -> State:
    """The reverse of `linear_attention`."""
    return {k: t[:, :, None, None] if _is_attention(k) and t.ndim == 2 else t for k, t in state.items()}


def split_attention(state: State) -> State:
    """Split OpenCLIP's `attn.in_proj_weight` (3D, D) and `in_proj_bias` into query, key and value."""
    split: State = {}
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".in_proj_")
        if stem:
            split |= {f"{stem}.{one}.{end}": part.clone() for one, part in zip(_QKV, tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    return split


def join_attention(state: State) -> State:
    """The reverse of `split_attention`."""
    joined = {}
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".q_proj.")
        if stem:
            joined[f"{stem}.in_proj_{end}"] = torch.cat([state[f"{stem}.{one}.{end}"] for one in _QKV])
        elif not any(f".{one}." in name for one in _QKV):
            joined[name] = tensor
    return joined


def _encoder(config: Mapping) -> Names:
    """The names of the part that UNet and ControlNet share: embeddings, encoding blocks and middle block."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
    }
    names |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    if config.get("addition_embed_type"):
        names |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    i = 1
    for block, kind in enumerate(config["down_block_types"]):
        for layer in range(config["layers_per_block"]):
            names |= _resnet(f"input_blocks.{i}.0", f"down_blocks.{block}.resnets.{layer}")
            if kind.startswith("CrossAttn"):
                names[f"input_blocks.{i}.1"] = f"down_blocks.{block}.attentions.{layer}"
            i += 1
        names[f"input_blocks.{i}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"  # the last block has none
        i += 1
    return names


def _resnet(original: str, diffusers: str) -> Names:
    return {f"{original}.{a}": f"{diffusers}.{b}" for a, b in _RESNET.items()}


def _vae_resnet(original: str, diffusers: str) -> Names:
    same = {f"{original}.{name}": f"{diffusers}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    return same | {f"{original}.nin_shortcut": f"{diffusers}.conv_shortcut"}


def _is_attention(name: str) -> bool:
    return ".mid.attn_1." in name or ".mid_block.attentions.0." in name
