"""Whether a canvas fits into the free memory."""

from __future__ import annotations

import psutil
import torch
from controlnet.model.base import Base
from controlnet.preprocessors.errors import UsageError

TILE = 512
"""Pixels of the side of the tiles that `low_memory` decodes in."""


def check_memory(base: Base, size: tuple[int, int], low_memory: bool, tile: int | None = None) -> None:
    """Raises UsageError for a canvas (width, height) that does not fit into the free memory, or of which no tile of
    this side does. The estimate counts the
    numbers alive at once: 14 per channel and pixel in the decoder (measured at 512 to 768 pixels, benchmarks/LOG.md),
    and 40 per channel and latent cell in the UNet, for each half of the guidance."""
    width, height = (min(side, tile) for side in size) if tile else size
    config = base.vae.config
    channels = (config.get("block_out_channels") or config.decoder_block_out_channels)[0]
    decoder = 14 * channels * (TILE**2 if low_memory else width * height)
    cells = width * height / base.factor**2
    unet = 40 * base.unet.config.block_out_channels[0] * cells * (1 if low_memory else 2)
    needed, free = max(decoder, unet) * base.dtype.itemsize, free_memory(base.device)
    if needed > free:
        fits = int((free / needed) ** 0.5 * min(size)) // 64 * 64
        raise UsageError(
            ("a tile of " if tile else "size ")
            + f"{width}x{height}: needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB of memory are free",
            ("" if low_memory else "--low-memory; ")
            + ("another --dtype" if tile else f"--tiles; or --size {max(64, fits)}"),
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
