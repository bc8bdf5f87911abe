"""What training needs on a GPU, by count: no number is computed, tensors have shapes only (torch's meta device).

    python benchmarks/memory.py

Counted are the base's UNet in bfloat16; the ControlNet's float32 weights, gradients, AdamW's moments and averages; the
bfloat16 copies of the weights that autocast keeps; what the forward pass keeps for the backward one, with gradient
checkpointing; and the largest block, whose inside is computed again. Attention keeps what fused kernels keep. Not
counted: workspaces of kernels and what the allocator wastes, some 1 to 2 GB.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from controlnet.model.control import unet as walk
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.prompt import Prompt
from controlnet.model.files.families import SD1, SDXL, Family
from controlnet.model.nets import _built
from diffusers import ControlNetModel, UNet2DConditionModel

FORMS = {
    "full": {},
    "mid": {"transformer_layers_per_block": (0, 0, 1)},
    "small": {
        "down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": 1,
    },
}  # fmt: skip
"""SDXL's ControlNets as diffusers publishes them: with all of the attention, little, or none."""
CARDS = (16, 24, 48, 80)
ROWS = [(SDXL, "full", 1024), (SDXL, "full", 512), (SDXL, "mid", 1024), (SDXL, "small", 1024), (SDXL, "small", 512),
        (SD1, "full", 512)]  # fmt: skip


class FusedAttention(torch.autograd.Function):
    """Keeps queries, keys, values and the result, and no matrix of N by N."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Kept:
    """Bytes that are kept for the backward pass inside the context; a storage counts once, weights do not."""

    def __init__(self, *networks: torch.nn.Module):
        self.weights = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
        self.kept: dict[int, torch.Tensor] = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self.weights:
            self.kept[storage] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def networks(family: Family, form: str):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(family.unet)).bfloat16().requires_grad_(False)
        if form == "full":
            return unet, ControlNet.from_base(unet)
        keys = inspect.signature(ControlNetModel.__init__).parameters
        config = {key: value for key, value in family.unet.items() if key in keys} | FORMS[form]
        return unet, _built(dict(ControlNetModel(**config).config) | {"_class_name": "ControlNetModel"}, None)


def activations(family: Family, unet, net, side: int, batch: int) -> tuple[int, int]:
    """(bytes kept between the passes, bytes inside the largest block)."""
    width = family.unet["cross_attention_dim"]
    z = torch.empty(batch, 4, side // 8, side // 8, device="meta", dtype=torch.bfloat16)
    condition = torch.empty(batch, 3, side, side, device="meta", dtype=torch.bfloat16)
    text = torch.empty(batch, 77, width, device="meta", dtype=torch.bfloat16)
    added = family.added
    pooled = torch.empty(batch, 1280, device="meta", dtype=torch.bfloat16) if added else None
    ids = torch.empty(batch, 6, device="meta") if added else None
    t = torch.empty(batch, device="meta", dtype=torch.long)
    prompt = Prompt(text, pooled, ids)
    net.gradient_checkpointing = True
    unet.enable_gradient_checkpointing()
    largest = 0

    def run(function, checkpointed, *arguments):
        nonlocal largest
        with Kept(unet, net) as inside:
            out = function(*arguments)
        largest = max(largest, inside.bytes)
        for argument in arguments:
            for tensor in argument if isinstance(argument, list) else [argument]:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    kept.keep(tensor)
        return out

    usual, attention = walk._run, F.scaled_dot_product_attention
    walk._run, F.scaled_dot_product_attention = run, FusedAttention.apply
    try:
        kept = Kept(unet, net)
        with kept:
            control = net(z, t, prompt, net.prepare(condition))
            walk.denoise(unet, z, t, prompt, control)
    finally:
        walk._run, F.scaled_dot_product_attention = usual, attention
    return kept.bytes, largest


def main() -> None:
    print("| base | ControlNet | pixels | parameters | fixed GB | GB per picture | largest block GB | "
          + " | ".join(f"batch on {card} GB" for card in CARDS) + " |")  # fmt: skip
    print("|---|---|---|---|---|---|---|" + "---|" * len(CARDS))
    for family, form, side in ROWS:
        unet, net = networks(family, form)
        count = sum(p.numel() for p in net.parameters())
        fixed = 2 * sum(p.numel() for p in unet.parameters()) + count * (4 + 4 + 8 + 4 + 2)
        kept, block = activations(family, unet, net.bfloat16(), side, 1)
        fits = []
        for card in CARDS:
            room = 0.92 * card * 2**30 - 1.5e9 - fixed
            fits.append(str(int(room / (kept + block))) if room > kept + block else "-")
        sizes = f"{count / 1e9:.2f} G | {fixed / 1e9:.1f} | {kept / 1e9:.2f} | {block / 1e9:.2f}"
        print(f"| {family.name} | {form} | {side} | {sizes} | {' | '.join(fits)} |", flush=True)


if __name__ == "__main__":
    main()
