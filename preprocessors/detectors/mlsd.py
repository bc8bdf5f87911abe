"""Straight lines by M-LSD (Gu et al. 2022, arXiv 2106.00186), run by LiteRT: a network at 512 pixels finds the middles
of lines, and from each the way to its two ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors import litert
from controlnet.preprocessors.errors import UsageError

FILE = "M-LSD_512_large_fp16.tflite"
SIDE = 512
SHAPES = ((1, SIDE, SIDE, 4), (1, 200, 2), (1, 200), (1, SIDE // 2, SIDE // 2, 4))
"""The picture with a channel of ones; the 200 likeliest middles (row, column), their scores, and the ways to the ends
(x, y, x, y), in cells of two pixels."""


@dataclass(frozen=True)
class MlsdOptions:
    score: float = 0.1
    """How sure it must be of a line (0 to 1)."""
    length: float = 20.0
    """The shortest line, in cells of two pixels of the 512 that the network sees (0 to 512)."""

    def __post_init__(self):
        if not 0 <= self.score <= 1 or not 0 <= self.length <= SIDE:
            raise UsageError(
                f"score={self.score:g}, length={self.length:g}: expected 0 to 1, and 0 to {SIDE}",
                "controlnet detect mlsd PHOTO --score 0.1 --length 20",
            )


def mlsd(image: np.ndarray, options: MlsdOptions, weights: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, 0 or 255: lines of one pixel."""
    map_ = np.zeros(image.shape[:2], np.uint8)
    for line in lines(image, options, weights):
        x0, y0, x1, y1 = (int(v) for v in line)
        cv2.line(map_, (x0, y0), (x1, y1), 255, 1)
    return map_


def lines(image: np.ndarray, options: MlsdOptions, weights: Path) -> np.ndarray:
    """The lines of a photo (H, W, 3) uint8 RGB: (N, 4) x, y, x, y in pixels, the surest first."""
    network = litert.load(weights / FILE, SHAPES, "mlsd")
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    middles, scores, ways = litert.run(network, np.dstack([small, np.ones((SIDE, SIDE, 1))]), 3)
    rows, columns = middles.T
    to_ends = ways[rows, columns]
    lengths = np.hypot(*(to_ends[:, :2] - to_ends[:, 2:]).T)
    ends = (np.column_stack([columns, rows, columns, rows]) + to_ends) * 2
    height, width = image.shape[:2]
    kept = (scores > options.score) & (lengths > options.length)
    return ends[kept] * np.tile((width / SIDE, height / SIDE), 2)
