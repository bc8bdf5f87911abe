"""The device and the number type that networks of torch run in. Imports torch only when called."""

from __future__ import annotations

from controlnet.preprocessors.errors import UsageError


def choose_device(name: str | None):
    """The named device, by default the best of this machine. Raises UsageError for one that is not there."""
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
