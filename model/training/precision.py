"""The arithmetic of training: autocast over float32 master weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def autocast(device: torch.device, precision: str = "bfloat16", small: bool = True) -> Iterator[None]:
    """Autocast to `precision`. On a CPU, and for `small` pictures (256 pixels and less), attention in bfloat16 is done
    as plain matrix products: the fused kernel's backward is ten times slower there (benchmarks/LOG.md)."""
    dtype = PRECISIONS[precision]
    plain = device.type == "cpu" and small and dtype is torch.bfloat16
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with (
        torch.autocast(device.type, dtype, enabled=dtype is not torch.float32),
        sdpa_kernel(backends[-1:] if plain else backends),
    ):
        yield
