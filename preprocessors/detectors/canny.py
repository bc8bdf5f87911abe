"""Canny edges of a colour photo: white one-pixel lines on black.

cv2.Canny on the colour image, as controlnet-aux does it: the gradient of each pixel is that of its strongest channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from controlnet.preprocessors.errors import UsageError


@dataclass(frozen=True)
class CannyOptions:
    low: int = 100
    """Gradient from which a pixel may continue a line (0 to 2000)."""
    high: int = 200
    """Gradient from which a pixel starts a line (0 to 2000, not below --low)."""
    auto: bool = False
    """Take both thresholds from the photo's gradients instead."""

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 2000:
            raise UsageError(
                f"canny thresholds low={self.low}, high={self.high}: expected 0 <= low <= high <= 2000",
                "controlnet detect canny PHOTO --low 100 --high 200",
            )


def canny(image: np.ndarray, options: CannyOptions = CannyOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, 0 or 255."""
    low, high = auto_thresholds(image) if options.auto else (options.low, options.high)
    return cv2.Canny(image, low, high)


def auto_thresholds(image: np.ndarray) -> tuple[int, int]:
    """(low, high) such that about a tenth of the pixels could start a line: high is the 90th percentile of the
    gradient (L1 norm of Sobel, the measure cv2.Canny compares with), within [40, 600]; low is 0.4 of it."""
    dx = np.abs(cv2.Sobel(image, cv2.CV_16S, 1, 0)).astype(np.uint16)
    dy = np.abs(cv2.Sobel(image, cv2.CV_16S, 0, 1)).astype(np.uint16)
    high = int(np.clip(np.percentile((dx + dy).max(axis=2), 90), 40, 600))
    return round(0.4 * high), high
