"""The geometry of detect: a photo is brought to the map's size first, then detected at that size."""

from __future__ import annotations

import re

import cv2
import numpy as np
from controlnet.preprocessors.errors import UsageError

RESIZES = ("crop", "pad", "stretch", "keep")
STEP = 8
"""Sides are multiples of this many pixels: one cell of the latent."""
MIN_SIDE, MAX_SIDE = 64, 8192


Box = tuple[float, float, float, float]
"""A part of a picture: left, top, right and bottom as fractions of its width and height."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def inside(image: np.ndarray, box: Box | None) -> np.ndarray:
    """The part (H', W', ...) of a picture (H, W, ...) in a box; all of it without one."""
    if box is None:
        return image
    height, width = image.shape[:2]
    left, right = (round(side * width) for side in (box[0], box[2]))
    top, bottom = (round(side * height) for side in (box[1], box[3]))
    return np.ascontiguousarray(image[top : max(bottom, top + 1), left : max(right, left + 1)])


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `768x512` -> (width, height). Raises UsageError unless both are multiples of 8 from 64 to 8192."""
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not match:
        raise UsageError(f"size {text!r}: expected a number or WIDTHxHEIGHT", "--size 512 or --size 768x512")
    width = int(match[1])
    height = int(match[2] or width)
    for side in (width, height):
        if side % STEP or not MIN_SIDE <= side <= MAX_SIDE:
            near = min(MAX_SIDE, max(MIN_SIDE, (side + STEP // 2) // STEP * STEP))
            what = f"a multiple of {STEP}" if MIN_SIDE <= side <= MAX_SIDE else f"{MIN_SIDE} to {MAX_SIDE}"
            raise UsageError(f"size {text!r}: {side} pixels, expected {what}", f"--size {near}")
    return width, height


def check_resize(resize: str) -> None:
    """Raises UsageError for a manner that `fit` does not know."""
    if resize not in RESIZES:
        raise UsageError(f"--resize {resize!r}: expected one of {', '.join(RESIZES)}", "--resize crop")


def fit(image: np.ndarray, size: tuple[int, int], resize: str = "crop") -> np.ndarray:
    """Bring (H, W, 3) uint8 to `size` (width, height).

    crop: fill the size and cut off what hangs over, centred. pad: show all of it, with black bars. stretch: ignore the
    aspect. keep: the photo's own size, centre-cropped to multiples of 8 (`size` is ignored). Shrinks by area averaging,
    enlarges by Lanczos. Raises UsageError for any other `resize`.
    """
    height, width = image.shape[:2]
    if resize == "keep":
        return _centre(image, width // STEP * STEP, height // STEP * STEP)
    if resize == "stretch":
        return _scale(image, *size)
    if resize not in RESIZES:
        raise UsageError(f"resize {resize!r}: expected one of {', '.join(RESIZES)}", "--resize crop")
    ratios = size[0] / width, size[1] / height
    ratio = max(ratios) if resize == "crop" else min(ratios)
    bound = max if resize == "crop" else min
    scaled = _scale(
        image,
        bound(size[0], round(width * ratio)) if ratio == ratios[1] else size[0],
        bound(size[1], round(height * ratio)) if ratio == ratios[0] else size[1],
    )
    if resize == "crop":
        return _centre(scaled, *size)
    out = np.zeros((size[1], size[0], 3), np.uint8)
    h, w = scaled.shape[:2]
    y, x = (size[1] - h) // 2, (size[0] - w) // 2
    out[y : y + h, x : x + w] = scaled
    return out


def _centre(image: np.ndarray, width: int, height: int) -> np.ndarray:
    y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[y : y + height, x : x + width])


def _scale(image: np.ndarray, width: int, height: int) -> np.ndarray:
    width, height = max(1, width), max(1, height)
    if (width, height) == (image.shape[1], image.shape[0]):
        return image
    if width * height < image.shape[0] * image.shape[1]:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    # Of 16-bit numbers OpenCV enlarges in two thirds of the time that it takes of 8-bit ones, and rounds better.
    large = cv2.resize(image.astype(np.int16), (width, height), interpolation=cv2.INTER_LANCZOS4)
    return cv2.add(large, (0, 0, 0, 0), dtype=cv2.CV_8U)  # below 0 is 0, above 255 is 255


def window(photo: tuple[int, int], size: tuple[int, int], resize: str) -> tuple[float, float, float, float, tuple]:
    """The part of a photo (width, height) that `fit` shows: left, top, width and height as fractions of the photo,
    possibly reaching outside it; and the resulting size (width, height). Raises as `fit` does."""
    if resize == "keep":
        size = (photo[0] // STEP * STEP, photo[1] // STEP * STEP)
    elif resize not in RESIZES:
        raise UsageError(f"resize {resize!r}: expected one of {', '.join(RESIZES)}", "--resize crop")
    if resize == "stretch":
        return 0.0, 0.0, 1.0, 1.0, size
    ratios = size[0] / photo[0], size[1] / photo[1]
    ratio = {"crop": max(ratios), "pad": min(ratios), "keep": 1.0}[resize]
    width, height = size[0] / ratio / photo[0], size[1] / ratio / photo[1]
    if resize == "crop":  # by rounding alone it would reach outside
        width, height = min(1.0, width), min(1.0, height)
    return (1 - width) / 2, (1 - height) / 2, width, height, size
