"""Files mapped into memory: what is used of one is read then, and its memory can be given back at any time."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from controlnet.preprocessors.errors import OutputError
from controlnet.preprocessors.weights import cache_folder
from torch import Tensor, nn

LARGE = 1_000_000
"""Bytes of a tensor from which on it is worth a place in a file."""
_LIVE: WeakSet[Mapping] = WeakSet()


class Mapping(mmap.mmap):
    """A whole file in memory, as long as it or one of its tensors lives. Writing to `of_file`'s changes the memory
    alone; writing to `spare`'s may be done as to any memory."""

    @classmethod
    def of_file(cls, path: Path) -> Mapping:
        """Raises OSError, and ValueError for an empty file."""
        with open(path, "rb") as file:
            return cls._known(cls(file.fileno(), 0, access=mmap.ACCESS_COPY))

    @classmethod
    def spare(cls, size: int) -> Mapping:
        """Of a new file of so many bytes in the cache folder, which goes with it. Raises OutputError."""
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full is found here, not at a write
                file.truncate(size)
                return cls._known(cls(file.fileno(), size))
        except OSError as error:
            raise OutputError(
                f"{folder}: --low-memory keeps {size / 1e9:.1f} GB of weights in a file there, which cannot be made"
                f" ({error.strerror or error})",
                "free some disk, or set CONTROLNET_CACHE to a folder on another one",
            ) from error

    @classmethod
    def _known(cls, mapping: Mapping) -> Mapping:
        _LIVE.add(mapping)
        return mapping

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], start: int) -> Tensor:
        """The tensor that begins at byte `start`."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self, dtype=torch.uint8, count=size, offset=start).view(dtype).view(shape)

    def forget(self, start: int = 0, size: int | None = None) -> None:
        """Give back the memory of a part. It is read again from the file when it is used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.madvise(mmap.MADV_DONTNEED, first, (len(self) if size is None else start + size) - first)

    @contextmanager
    def forgotten(self, every: float = 0.05) -> Iterator[None]:
        """While the context lasts, which may read the file as it likes, little of it is in memory. `every` is in
        seconds."""
        done = Event()

        def watch() -> None:
            while not done.wait(every):
                self.forget()

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.forget()


def forget(tensor: Tensor) -> None:
    """Give back the memory of a tensor, if it is mapped."""
    for mapping in list(_LIVE):
        start = tensor.data_ptr() - np.frombuffer(mapping, np.uint8, 1).ctypes.data
        if 0 <= start < len(mapping):
            mapping.forget(start, tensor.numel() * tensor.element_size())


class Spare:
    """A file for the weights of a network: each is in memory only while its layer works."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.sizes = {
            name: -(-tensor.numel() * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
            for name, tensor in network.named_parameters()
            if tensor.numel() * dtype.itemsize >= LARGE
        }
        self.mapping, self.end, self.dtype = Mapping.spare(sum(self.sizes.values()) or 1), 0, dtype
        for module in network.modules():
            if any(tensor.numel() * dtype.itemsize >= LARGE for tensor in module.parameters(recurse=False)):
                module.register_forward_hook(_forget_weights)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter in the file, in the type; as it is if it is a small one. Convolutions in channels_last."""
        if name not in self.sizes:
            return tensor
        last = tensor.ndim == 4
        shape = tensor.permute(0, 2, 3, 1).shape if last else tensor.shape
        own = self.mapping.tensor(self.dtype, shape, self.end)
        own = (own.permute(0, 3, 1, 2) if last else own).copy_(tensor)
        self.mapping.forget(self.end, self.sizes[name])
        self.end += self.sizes[name]
        return own


def _forget_weights(module: nn.Module, inputs: Any, outputs: Any) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.numel() * parameter.element_size() >= LARGE:
            forget(parameter)
