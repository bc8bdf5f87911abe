"""Files of weights that are neither a base nor a ControlNet, or none that works here. They are recognised by a mark in
the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable

STRANGERS = {
    "lora_controlnet": "a Control-LoRA, which is not supported yet",
    "lllite_": "a ControlNet-LLLite, which is not supported yet",
    "adapter.body.": "a T2I-Adapter: give its folder, which has a config.json",
    "body.0.block1.": "a T2I-Adapter in its original layout: one in diffusers' is read",
    "ip_adapter.": "an IP-Adapter, which is not supported yet",
    "image_proj.": "an IP-Adapter, which is not supported yet",
    "lora_": "a LoRA: give it with --lora",
    "hada_w1": "a LoRA: give it with --lora",
    "lokr_w1": "a LoRA: give it with --lora",
    "model.diffusion_model.joint_blocks.": "an SD 3 base, which is not supported",
    "double_blocks.": "a Flux model, which is not supported",
    "single_transformer_blocks.": "a Flux model, which is not supported",
}
"""Mark -> what the file is."""
PARTS = {
    "decoder.conv_in.weight": "a VAE: give it as --vae",
    "conditioner.embedders.": "a part of an SDXL base",
    "down_blocks.0.resnets.": "the UNet of a base in diffusers' names, without its config",
}
"""The same for parts of bases. Checked only in files that hold no base and no ControlNet, since those have such names
too."""


def stranger(names: Iterable[str], with_parts: bool = False) -> str:
    """What a file with tensors of these names is, if it is one of STRANGERS, or also of PARTS, else ''."""
    names = list(names)
    marks = STRANGERS | PARTS if with_parts else STRANGERS
    return next((what for mark, what in marks.items() if any(mark in name for name in names)), "")
