"""Stage two: prompts and conditions -> images. Joins the base, the ControlNets and the sampling loop.

Reads and writes no files; `cli/generate.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from controlnet.model.base import Base
from controlnet.model.canvas import condition_tensor
from controlnet.model.controlnet import ControlNet
from controlnet.model.sampling import Applied, draw_noise, sample
from controlnet.model.schedulers import make_scheduler
from controlnet.preprocessors.errors import ModelError
from torch import Tensor

BATCH = 4
"""Images sampled together; more would need more memory, and no image depends on it."""


@dataclass(frozen=True)
class Placed:
    """A condition on the canvas, (H, W, 3) uint8, with the ControlNet that reads it."""

    condition: np.ndarray
    net: ControlNet
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@torch.no_grad()
def generate(
    base: Base,
    prompt: str,
    placed: list[Placed],
    size: tuple[int, int],
    seeds: list[int],
    negative: str = "",
    steps: int = 20,
    guidance: float | None = None,
    scheduler: str | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[tuple[int, np.ndarray]]:
    """One (seed, image (H, W, 3) uint8) after another. `size` is (width, height); on_step is told the evaluations done
    and their number over all images. Raises ModelError when the latents stop being finite."""
    guidance = base.guidance if guidance is None else guidance
    text = base.encode_text([prompt])  # (1, T, D)
    null_text = base.encode_text([negative]) if guidance != 1 else None
    # The hint feature depends on the condition alone: once, before the loop, for both guidance halves and all images.
    controls = [Applied(p.net, p.net.encode_hint(_input(p.condition, base)), p.scale, p.start, p.end) for p in placed]
    width, height = size
    shape = (base.unet.config.in_channels, height // base.factor, width // base.factor)
    groups = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
    for index, group in enumerate(groups):

        def step(done: int, of: int, index: int = index) -> None:
            on_step(index * of + done, len(groups) * of)

        noise, generators = draw_noise(group, shape)
        latents = sample(
            base.unet, make_scheduler(base.scheduler, scheduler), noise, text.expand(len(group), -1, -1), null_text,
            controls, steps, guidance, generators, step,
        )  # fmt: skip
        if not torch.isfinite(latents).all():
            raise ModelError(f"the latents are not finite in {base.dtype}", "--dtype float32")
        for seed, latent in zip(group, latents, strict=True):
            yield seed, to_pixels(base.decode(latent[None].to(base.dtype)))[0]


def _input(condition: np.ndarray, base: Base) -> Tensor:
    return condition_tensor(condition)[None].to(base.device, base.dtype)


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, by rounding."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def canvas_size(base: Base, condition_size: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height): the condition's aspect with its shorter side at the base's native size, in multiples of 8."""
    native, step = base.native_size, base.factor
    if condition_size is None:
        return native, native
    width, height = condition_size
    ratio = native / min(width, height)
    width, height = (max(step, round(side * ratio / step) * step) for side in (width, height))
    return width, height
