"""What the work runs on: device, number type, and how much the libraries print. Imports torch only when called."""

from __future__ import annotations

import ctypes
import os
import sys

from controlnet.model.work.libraries import import_libraries
from controlnet.preprocessors.errors import UsageError


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


def choose_device(name: str | None):
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    if not available.get(name.split(":")[0]):
        raise UsageError(
            f"--device {name}: expected one of {', '.join(n for n, there in available.items() if there)}",
            "--device cpu",
        )
    return torch.device(name)


def choose_dtype(name: str | None, device):
    """The named number type; else float16 on CUDA, bfloat16 on a CPU that multiplies it in hardware, else float32."""
    import torch

    if name is None and device.type == "cpu":
        known: dict = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "float16", "bfloat16"):
        raise UsageError(f"--dtype {name}: expected float32, float16 or bfloat16", "--dtype float32")
    return getattr(torch, name)


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
