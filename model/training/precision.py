"""The arithmetic of training: autocast over float32 master weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, precision: str = "bfloat16") -> torch.autocast:
    """Autocast of a forward pass to `precision`."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


@contextmanager
def attention_kernels(device: torch.device, precision: str = "bfloat16", small: bool = True) -> Iterator[None]:
    """Choose the kernels of attention. Wrap both forward and backward, since gradient checkpointing computes the
    forward again in the backward. On a CPU, bfloat16 with `small` pictures (256 pixels and less) uses plain matrix
    products: the fused kernel's backward is ten times slower there (benchmarks/LOG.md)."""
    plain = device.type == "cpu" and small and PRECISIONS[precision] is torch.bfloat16
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends[-1:] if plain else backends):
        yield
