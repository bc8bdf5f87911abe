"""Networks in ONNX's format, run by onnxruntime (the extra `onnx`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from controlnet.preprocessors.errors import ModelError, reason


@cache
def load(path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...], name: str):
    """The network in a file. Raises ModelError for a file of something else, or a network with other inputs or without
    these outputs; `name` is that of the weights."""
    import onnxruntime

    cure = f"controlnet models pull {name}, or --weights DIR"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        network = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime's own errors, for a file of something else
        raise ModelError(f"{path}: is no ONNX network ({reason(error)[:200]})", cure) from error
    own = tuple(one.name for one in network.get_inputs())
    made = tuple(one.name for one in network.get_outputs())
    if own != inputs or not set(outputs) <= set(made):
        raise ModelError(
            f"{path}: another network, of {', '.join(own)} to {', '.join(made)};"
            f" {name} is of {', '.join(inputs)} to {', '.join(outputs)}",
            cure,
        )
    return network


def run(network, outputs: tuple[str, ...], **inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs. Raises ModelError for a network that does not take these inputs."""
    try:
        return network.run(list(outputs), inputs)
    except Exception as error:
        raise ModelError(f"the ONNX network fails ({reason(error)[:200]})", "--weights DIR") from error
