"""The engines by name, and which one is used where none is named."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from controlnet.model.engines.engine import Eager, Engine
from controlnet.preprocessors.errors import UsageError

ENGINES = ("eager", "graphs", "compiled", "openvino")
LARGE = 100_000_000
"""Parameters of a UNet from which on a graph of OpenVINO is quicker than making it takes, after a few images."""


def engine_name(name: str | None, device: Any, dtype: Any, low_memory: bool, parameters: int) -> str:
    """The engine to use for a UNet of so many parameters: the named one; else, if memory is not scarce, CUDA graphs on
    CUDA, and OpenVINO on a CPU for a large UNet if it is installed; else torch's own. Raises UsageError for an engine
    that cannot be used."""
    import torch

    carried = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if name is None:
        if low_memory:
            return "eager"
        if device.type == "cuda":
            return "graphs"
        return "openvino" if carried and parameters >= LARGE and find_spec("openvino") else "eager"
    if name not in ENGINES:
        raise UsageError(f"--engine {name}: expected {', '.join(ENGINES[:-1])} or {ENGINES[-1]}", "--engine eager")
    if name == "graphs" and device.type != "cuda":
        raise UsageError(f"--engine graphs: records on CUDA alone, the device is {device.type}", "--engine eager")
    if name in ("graphs", "compiled") and device.type == "cuda" and low_memory:
        raise UsageError(f"--engine {name}: needs networks that stay on the device", "--engine eager --low-memory")
    if name == "openvino" and not carried:
        what = f"{device.type} and {str(dtype).removeprefix('torch.')}"
        raise UsageError(f"--engine openvino: {what}; expected a CPU and float32 or bfloat16", "--engine eager")
    return name


def make_engine(name: str, say: Callable[[str], None] = lambda text: None) -> Engine:
    """An engine by its name. Raises UsageError if what it needs is not installed."""
    if name == "openvino":
        from controlnet.model.engines.openvino import OpenVino  # here: it imports OpenVINO

        return OpenVino(say)
    if name == "eager":
        return Eager()
    from controlnet.model.engines.graphs import Compiled, Graphs

    return Graphs() if name == "graphs" else Compiled()
