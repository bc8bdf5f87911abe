"""The canvas: the pixel size of the image to be generated, how it is chosen, and how a condition is brought to it.

Sampling and training both call `to_canvas`, so a network samples with maps that look like those it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.base import Base
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.kinds import PALETTE, kind_named
from controlnet.preprocessors.skeleton import draw
from torch import Tensor


def to_canvas(
    condition: np.ndarray, kind: str, size: tuple[int, int], people: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Bring a condition (H, W, 3) uint8 to a size (width, height).

    Line maps shrink by the maximum of each cell, so that no line is lost or turns grey, and grow by nearest neighbour.
    A pose whose `people` are known (preprocessors.skeleton) is drawn anew. Palettes take the nearest neighbour: between
    two colours is a third that means something else. Other maps shrink by area and grow linearly. A map of another
    aspect is stretched.
    """
    if people is not None:
        return draw(people, size)
    width, height = size
    if condition.shape[:2] == (height, width):
        return condition
    if kind_named(kind).form == PALETTE:
        return cv2.resize(condition, size, interpolation=cv2.INTER_NEAREST)
    if not kind_named(kind).is_lines:
        shrinks = width * height < condition.shape[0] * condition.shape[1]
        return cv2.resize(condition, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    h, w = min(height, condition.shape[0]), min(width, condition.shape[1])
    # The cells of adaptive pooling run from floor(i H / h) to ceil((i + 1) H / h): none is empty, every pixel counts.
    pixels = torch.from_numpy(np.array(condition)).permute(2, 0, 1).half()
    pooled = F.adaptive_max_pool2d(pixels, (h, w)).byte().permute(1, 2, 0).numpy()
    return cv2.resize(pooled, size, interpolation=cv2.INTER_NEAREST)


def on_canvas(condition: Condition, size: tuple[int, int]) -> Condition:
    """The condition with its map (H, W, 3) uint8 at the canvas's size (width, height)."""
    return replace(condition, map=to_canvas(condition.rgb, condition.kind, size, condition.people))


def condition_tensor(condition: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float in [0, 1], the range of every condition here."""
    return torch.from_numpy(np.array(condition)).permute(2, 0, 1).float() / 255


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, by rounding."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


ASPECT = 0.03
"""How far the aspect of a canvas may be from that of a picture that is not to be distorted."""
DETECTED = 512
"""Pixels of the shorter side of a map that is detected for a canvas."""


def detection_size(canvas: tuple[int, int]) -> tuple[int, int]:
    """Size (width, height) of the map to detect for a canvas: the same aspect, in multiples of 8."""
    ratio = DETECTED / min(canvas)
    width, height = (round(side * ratio / 8) * 8 for side in canvas)
    return width, height


def canvas_size(base: Base, condition_size: tuple[int, int] | None, own_aspect: bool = False) -> tuple[int, int]:
    """The default canvas (width, height) for a condition: the one of the base's trained sizes with the nearest aspect,
    or with `own_aspect` one of as many pixels with the condition's. If it was trained on one size: the condition's
    aspect, with the shorter side native, in multiples of 8."""
    native, step = base.native_size, base.factor
    if condition_size is None:
        return native, native
    width, height = condition_size
    if base.sizes and own_aspect:
        return _of_aspect(native, width / height, 64 if native >= 512 else step, step)
    if base.sizes:
        return min(trained_sizes(base), key=lambda size: abs(math.log(size[0] / size[1] * height / width)))
    ratio = native / min(width, height)
    width, height = (max(step, round(side * ratio / step) * step) for side in (width, height))
    return width, height


def _of_aspect(native: int, aspect: float, coarse: int, fine: int) -> tuple[int, int]:
    """A canvas (width, height) of about native x native pixels, whose aspect is within ASPECT of the given one: in
    steps of `coarse` pixels, or of fewer down to `fine` where these are too far apart."""
    wide, high = native * math.sqrt(aspect), native / math.sqrt(aspect)

    def off(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1] / aspect))

    for step in [step for step in (coarse, coarse // 2, coarse // 4) if step > fine] + [fine]:
        widths, heights = ({max(step, math.floor(s / step) * step), math.ceil(s / step) * step} for s in (wide, high))
        best = min(((w, h) for w in sorted(widths) for h in sorted(heights)), key=off)
        if off(best) < ASPECT:
            break
    return best


def own_size(base: Base, picture: tuple[int, int]) -> tuple[int, int]:
    """The canvas (width, height) of a picture's own size, in whole latent cells."""
    width, height = (max(1, round(side / base.factor)) * base.factor for side in picture)
    return width, height


def trained_sizes(base: Base) -> list[tuple[int, int]]:
    """The canvases (width, height) that the base was trained on: its family's, scaled if it was tuned at another native
    size. Empty for a family without such a list."""
    step, scale = base.factor, base.native_size / base.sizes[0][0] if base.sizes else 1
    return [(round(width * scale / step) * step, round(height * scale / step) * step) for width, height in base.sizes]
