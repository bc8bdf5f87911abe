"""Normal maps by MoGe-2 (Wang et al. 2025, arXiv 2507.02546), as ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from controlnet.preprocessors.detectors import onnx
from controlnet.preprocessors.detectors.depth import check_finite
from controlnet.preprocessors.errors import UsageError

FILE, INPUTS, OUTPUTS = "model.onnx", ("image", "num_tokens"), ("normal",)


@dataclass(frozen=True)
class MogeOptions:
    tokens: int = 2500
    """How finely it looks: patches that it sees (1200 to 3600)."""

    def __post_init__(self):
        if not 1200 <= self.tokens <= 3600:
            raise UsageError(
                f"tokens={self.tokens}: expected 1200 to 3600",
                "controlnet detect normal PHOTO --detector moge-2 --tokens 2500",
            )


def normal(image: np.ndarray, options: MogeOptions, weights: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> normals (H, W, 3) uint8, in the directions of `depth.to_normals`.

    The network's x is right, its y down and its z away from the viewer; a surface that is seen has a z below 0."""
    network = onnx.load(weights / FILE, INPUTS, OUTPUTS, "moge-2")
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / 255
    (found,) = onnx.run(network, OUTPUTS, image=pixels, num_tokens=np.array(options.tokens, np.int64))
    directions = -found[0]
    check_finite(directions)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True).clip(1e-6)
    return np.rint((directions + 1) * 127.5).astype(np.uint8)
