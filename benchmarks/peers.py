"""OpenVINO without this toolkit: diffusers' UNet and ControlNet as one graph of static shapes.

optimum-intel 2.2 has no pipeline with a ControlNet, so this is what its users would write themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from controlnet.model.engines.openvino import Request, core, load_openvino
from torch import Tensor, nn

OPTIONS = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}


class _Both(nn.Module):
    def __init__(self, unet: Any, nets: Sequence[Any]):
        super().__init__()
        self.unet, self.nets = unet, nn.ModuleList(nets)

    def forward(self, z: Tensor, t: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor]:
        found = [
            net(z, t, encoder_hidden_states=text, controlnet_cond=condition, return_dict=False) for net in self.nets
        ]
        down = [sum(column) for column in zip(*(down for down, _ in found), strict=True)]
        middle = sum(middle for _, middle in found)
        control = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(z, t, encoder_hidden_states=text, **control, return_dict=False)


def one_graph(unet: Any, nets: Sequence[Any], folder: Path, side: int = 512, batch: int = 1) -> Request:
    """Both halves of the guidance, in the networks' own type."""
    rows = 2 * batch
    inputs = (
        torch.randn(rows, 4, side // 8, side // 8, dtype=unet.dtype), torch.tensor(500.0),
        torch.randn(rows, 77, unet.config.cross_attention_dim, dtype=unet.dtype),
        torch.rand(rows, 3, side, side, dtype=unet.dtype),
    )  # fmt: skip
    return graph_of(_Both(unet, nets), inputs, folder / "both.xml")


def graph_of(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Request:
    """A module as OpenVINO runs it, by way of a file."""
    ov = load_openvino()
    start = time.perf_counter()
    if not path.is_file():
        nn.Module.to(module, memory_format=torch.contiguous_format)
        with torch.no_grad():
            model = ov.convert_model(torch.export.export(module, inputs))
        model.reshape({source: list(one.shape) for source, one in zip(model.inputs, inputs, strict=True)})
        ov.save_model(model, path, compress_to_fp16=False)
        del model
        nn.Module.to(module, memory_format=torch.channels_last)
    compiled = core().compile_model(core().read_model(path), "CPU", OPTIONS)
    print(f"{path.name}: {time.perf_counter() - start:.1f} s until it runs", flush=True)
    return Request(ov, compiled)


def sampled(request: Request, scheduler: Any, noise: Tensor, texts: Tensor, condition: Tensor, steps: int, guidance):
    """Latents by the graph, with a scheduler of diffusers. `texts` has as many rows as both halves."""
    scheduler.set_timesteps(steps)
    z = noise.float()
    condition = condition.expand(len(texts), *condition.shape[1:]).contiguous()
    for t in scheduler.timesteps:
        twice = torch.cat([z, z]).to(texts.dtype)
        without, with_prompt = request(twice, t.float(), texts, condition)[0].float().chunk(2)
        z = scheduler.step(without + guidance * (with_prompt - without), t, z, return_dict=False)[0]
    return z
