"""Line art: where a photo is darker than its surroundings, as white lines on black. No weights."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from controlnet.preprocessors.errors import UsageError


@dataclass(frozen=True)
class LineArtOptions:
    sigma: float = 6.0
    """Size of the surroundings: sigma of a blur in pixels."""
    threshold: int = 8
    """How many levels darker than its surroundings a pixel must be to count when line strength is measured."""

    def __post_init__(self):
        if not 0 < self.sigma <= 100 or not 0 <= self.threshold <= 255:
            raise UsageError(
                f"lineart sigma={self.sigma}, threshold={self.threshold}: expected sigma above 0, at most 100,"
                " and threshold 0 to 255",
                "controlnet detect lineart PHOTO --sigma 6 --threshold 8",
            )


def lineart(image: np.ndarray, options: LineArtOptions = LineArtOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, as in controlnet-aux's LineartStandardDetector: a line of the usual strength
    becomes 127."""
    pixels = image.astype(np.float32)
    darker = (cv2.GaussianBlur(pixels, (0, 0), options.sigma) - pixels).min(axis=2).clip(0, 255)
    lines = darker[darker > options.threshold]
    usual = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return (darker * (127 / usual)).clip(0, 255).astype(np.uint8)
