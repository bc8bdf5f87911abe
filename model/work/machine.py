"""What the work runs on: device, number type, and how much the libraries print. Imports torch only when called."""

from __future__ import annotations

import ctypes
import os
import sys

from controlnet.model.work.libraries import import_libraries


def silence_libraries(bars: bool = False) -> None:
    """Keep the libraries quiet: they talk while loading, and what matters to a user is said by this toolkit. Download
    bars are shown only if wanted and someone is watching."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (bars and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import_libraries()
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its device is full."""
    import torch

    words = ("allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, up to 2 GB. A network's activations are given back and wanted again
    all the time, and memory that is new to a process comes page by page: 8 % of an evaluation on a CPU. Where the C
    library is another than glibc, nothing happens."""
    largest_kept, least_given_back = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(largest_kept, 32 << 20)
        libc.mallopt(least_given_back, 2**31 - 1)
    except (OSError, AttributeError):
        return
