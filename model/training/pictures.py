"""Pictures to look at: what a ControlNet makes of held-out conditions while it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from controlnet.model.base import Base
from controlnet.model.control.net import Net
from controlnet.model.control.strength import Strength
from controlnet.model.load import reload
from controlnet.model.sampling.canvas import condition_tensor, to_pixels
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.model.training.precision import autocast
from controlnet.model.training.runfolder import RunFolder
from controlnet.model.training.samples import Samples
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_bytes, read_image
from controlnet.preprocessors.sheet import contact_sheet

SHOWN = 3
"""Held-out pairs in samples.png."""
STEPS = 20


@torch.no_grad()
def draw(base: Base, net: Net, held_out: Samples, device: torch.device, precision: str) -> np.ndarray:
    """Images from the conditions of the first held-out pairs, side by side: (side, n x side, 3) uint8. The base's VAE
    is loaded again if it was unloaded."""
    count, side = min(SHOWN, len(held_out.pairs)), held_out.size
    maps = [condition_tensor(held_out.condition(pair, 0, False)) for pair in held_out.pairs[:count]]
    conditions = torch.stack(maps).to(device)  # (n, 3, side, side)
    captions = [held_out.pairs[i].caption for i in range(count)]
    prompt, negative = (held_out.prompt(texts).to_network(device, base.dtype) for texts in (captions, [None]))
    if base.vae is None:
        reload(base, "vae")
    with autocast(device, precision):
        start = FromNoise.seeded(list(range(count)), (base.channels, side // 8, side // 8))
        applied = [ActiveNet(net, net.prepare(conditions), Strength(control_on=base.control_on))]
        scheduler = make_scheduler(base.scheduler)
        latents = sample(base.unet, scheduler, start, prompt, negative, applied, STEPS, base.guidance)
    return np.concatenate(list(to_pixels(base.decode(latents.float()))), 1)


def draw_strip(run: RunFolder, rows: list[dict[str, Any]], held_out: Samples, kind: str) -> None:
    """samples.png: a row for each of the first held-out pairs, with its picture, its condition, and what was made of it
    at each of the log's `rows` that has pictures."""
    shots: dict[int, np.ndarray] = {}
    for row in rows:
        path = run.path / row.get("pictures", "")
        if path.is_file():
            shots[row["step"]] = read_image(read_bytes(str(path)), path.name)[0]
    if not shots:
        return
    cells: list[tuple[np.ndarray, str]] = []
    side = held_out.size
    pairs = [(held_out.picture(pair, 0), held_out.condition(pair, 0, False)) for pair in held_out.pairs[:SHOWN]]
    write_file(run.held_out, png_bytes(np.concatenate([np.concatenate(row, 1) for row in zip(*pairs, strict=True)])))
    for i, (picture, condition) in enumerate(pairs):
        cells += [(picture, "held-out picture"), (condition, f"its {kind}")]
        cells += [(shot[:, i * side : (i + 1) * side], f"step {step}") for step, shot in sorted(shots.items())]
    write_file(run.samples, png_bytes(contact_sheet(cells, len(shots) + 2, 128)))
