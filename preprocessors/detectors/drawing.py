"""Strokes without a network, and drawings that are lines already."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from controlnet.preprocessors.errors import UsageError


@dataclass(frozen=True)
class ScribbleOptions:
    threshold: int = 32
    """How much a pixel must differ from its surroundings, in levels (1 to 255)."""

    def __post_init__(self):
        if not 1 <= self.threshold <= 255:
            raise UsageError(
                f"threshold={self.threshold}: expected 1 to 255",
                "controlnet detect scribble PHOTO --detector xdog --threshold 32",
            )


@dataclass(frozen=True)
class InvertOptions:
    pass


def scribble(image: np.ndarray, options: ScribbleOptions = ScribbleOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, 0 or 255: the difference of a fine and a coarse blur (Winnemoeller et al.
    2012, XDoG), darkest channel, doubled and thresholded as in ControlNet 1.1's scribble_xdog."""
    pixels = image.astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(pixels, (0, 0), sigma) for sigma in (0.5, 5.0))
    darker = (coarse - fine).min(axis=2)
    return np.where(2 * darker > options.threshold, 255, 0).astype(np.uint8)


def invert(image: np.ndarray, options: InvertOptions = InvertOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8: grey, black and white exchanged."""
    return 255 - cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
