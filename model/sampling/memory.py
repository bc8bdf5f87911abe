"""Whether a canvas fits into the free memory."""

from __future__ import annotations

import psutil
import torch
from controlnet.model.base import Base, maps_weights
from controlnet.preprocessors.errors import UsageError

TILE = 512
"""Pixels of the side of the tiles that `low_memory` decodes in."""


def check_memory(base: Base, size: tuple[int, int], low_memory: bool, tile: int | None = None) -> None:
    """Raises UsageError for a canvas (width, height) that does not fit into the free memory, or of which no tile of
    this side does. The estimate counts the numbers alive at once: 14 per channel and pixel in the decoder (measured at
    512 to 768 pixels, benchmarks/LOG.md), and 40 per channel and latent cell in the UNet, for each half of the
    guidance."""
    shown: tuple[int, int] = (min(size[0], tile), min(size[1], tile)) if tile else size
    decoder = numbers_of_decoder(base, TILE**2 if low_memory else shown[0] * shown[1])
    unet = numbers_of_half(base, shown) * (1 if low_memory else 2)
    needed, free = max(decoder, unet) * base.dtype.itemsize, free_memory(base.device)
    if needed > free:
        fits = int((free / needed) ** 0.5 * min(size)) // 64 * 64
        raise UsageError(
            ("a tile of " if tile else "size ")
            + f"{shown[0]}x{shown[1]}: needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB of memory are free",
            ("" if low_memory else "--low-memory; ")
            + ("another --dtype" if tile else f"--tiles; or --size {max(64, fits)}"),
        )


def numbers_of_decoder(base: Base, pixels: int) -> float:
    """Alive at once while so many pixels are decoded."""
    config = base.vae.config
    return 14 * (config.get("block_out_channels") or config.decoder_block_out_channels)[0] * pixels


def numbers_of_half(base: Base, size: tuple[int, int]) -> float:
    """Alive at once in the UNet, for one half of the guidance on a canvas (width, height)."""
    return 40 * base.unet.config.block_out_channels[0] * size[0] * size[1] / base.factor**2


def takes_halves_apart(base: Base, size: tuple[int, int]) -> bool:
    """Whether `low_memory` computes one half of the guidance at a time. Where weights are mapped both take no more than
    the decoder does later, up to a canvas of about a megapixel."""
    if not maps_weights(base.low_memory, base.device, base.engine):
        return base.low_memory
    return 2 * numbers_of_half(base, size) > numbers_of_decoder(base, TILE**2)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
