"""A part of a photo made anew: its mask, and the result laid over the photo, of which the rest stays byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from controlnet.model.work.jobs import ALPHA
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.data.check import same_aspect
from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.geometry import WHOLE, Box, fit, inside
from controlnet.preprocessors.images import read_bytes, read_image, read_rgba
from controlnet.preprocessors.metadata import sha256

AROUND, LEAST_AROUND = 0.25, 32
"""What a region shows beside what is painted: so much of its longer side, or so many pixels, on each side."""
LONGEST = 2.0
"""The largest aspect of a region, where the photo has room."""


@dataclass(frozen=True, eq=False)
class Painting:
    """A photo (H, W, 3) uint8 and how much of each pixel is made anew, (H, W) float32 in [0, 1]."""

    photo: np.ndarray
    share: np.ndarray
    mask_sha256: str
    box: Box = WHOLE
    """The part of the photo that the canvas shows."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of what the canvas shows."""
        height, width = inside(self.share, self.box).shape
        return width, height

    def on_canvas(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The photo (H, W, 3) uint8 and where it is made anew, (H, W) bool, on a canvas (width, height)."""
        share = inside(self.share, self.box)
        touched = fit((share > 0).astype(np.uint8) * 255, size, "stretch")
        return fit(inside(self.photo, self.box), size, "stretch"), touched > 0

    def laid_over(self, image: np.ndarray) -> np.ndarray:
        """The photo with an image of the canvas in its place, at the photo's own size."""
        result = self.photo.copy()
        left, top = round(self.box[0] * self.photo.shape[1]), round(self.box[1] * self.photo.shape[0])
        width, height = self.size
        part = result[top : top + height, left : left + width]
        share = self.share[top : top + height, left : left + width, None]
        new = fit(image, (width, height), "stretch").astype(np.float32)
        mixed = np.rint(part + share * (new - part)).clip(0, 255).astype(np.uint8)
        part[:] = np.where(share > 0, mixed, part)
        return result

    def check_canvas(self, size: tuple[int, int], name: str) -> None:
        """Raises UsageError for a canvas (width, height) of another aspect."""
        if not same_aspect(size, self.size, tolerance=0.05):
            width, height = self.size
            raise UsageError(
                f"a canvas of {size[0]}x{size[1]} to paint on {name} of {width}x{height}: expected its aspect",
                "no --size, or one of that aspect",
            )


def read_painting(
    init: str, mask_path: str, invert: bool, feather: int, region_only: bool, say: Callable[[str], None]
) -> Painting:
    """What is painted on a photo. Raises InputError for a mask that is one colour or cannot be read."""
    data = read_bytes(init)
    photo, _ = read_image(data, init)
    height, width = photo.shape[:2]
    if mask_path == ALPHA:
        rgba = read_rgba(data)
        if rgba is None:
            raise InputError(f"{init}: has no transparency for --mask {ALPHA}", "--mask mask.png")
        photo, mask, digest = rgba[..., :3], 255 - rgba[..., 3], sha256(data)  # the colours under the transparency
    else:
        mask, digest = _read_mask(mask_path, say)
    if mask.shape != (height, width):
        say(f"{mask_path}: mask of {mask.shape[1]}x{mask.shape[0]} brought to the photo's {width}x{height}")
        shrinks = mask.size > width * height
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    share = _share(255 - mask if invert else mask)
    if share.min() == 1 or share.max() == 0:
        what = "all of it is" if share.min() == 1 else "nothing is"
        hint = "leave --mask out" if share.min() == 1 else "white is made anew; --invert-mask exchanges black and white"
        raise InputError(f"{mask_path}: {what} to be made anew", hint)
    box = _box_around(share > 0) if region_only else WHOLE
    return Painting(photo, _feathered(share, feather), digest, box)


def _box_around(painted: np.ndarray) -> Box:
    """The box of what is painted (H, W) with some of the photo around it, of an aspect that bases are used to."""
    spans = []
    for axis in (1, 0):
        there = np.flatnonzero(painted.any(1 - axis))
        spans.append((int(there[0]), int(there[-1]) + 1))
    sides = [end - begin for begin, end in spans]
    around = max(round(AROUND * max(sides)), LEAST_AROUND)
    wanted = [side + 2 * around for side in sides]
    wanted = [max(side, round(max(wanted) / LONGEST)) for side in wanted]
    (left, right), (top, bottom) = (
        _span(begin, end, side, whole)
        for (begin, end), side, whole in zip(spans, wanted, painted.shape[::-1], strict=True)
    )
    height, width = painted.shape
    return left / width, top / height, right / width, bottom / height


def _span(begin: int, end: int, side: int, whole: int) -> tuple[int, int]:
    """`side` pixels around a span, moved into 0 to `whole`."""
    side = min(side, whole)
    first = min(max(0, (begin + end - side) // 2), whole - side)
    return first, first + side


def _read_mask(path: str, say: Callable[[str], None]) -> tuple[np.ndarray, str]:
    """(H, W) uint8 of a mask's file, what is transparent in it black; and the sha256 of the file."""
    data = read_bytes(path)
    mask = read_image(data, path, say)[0].max(2)
    rgba = read_rgba(data)
    if rgba is not None:
        mask = np.rint(rgba[..., :3].max(2) * (rgba[..., 3] / 255)).astype(np.uint8)
    return mask, sha256(data)


NEAR_BLACK = 16
"""Levels from black, and from white, that count as it: JPEG does not keep them."""


def _share(mask: np.ndarray) -> np.ndarray:
    """How much of each pixel is made anew, (H, W) float32, by a mask's grey levels."""
    levels = (mask.astype(np.float32) - NEAR_BLACK) / (255 - 2 * NEAR_BLACK)
    return levels.clip(0, 1)


def _feathered(share: np.ndarray, width: int) -> np.ndarray:
    """The share, rising from 0 over `width` pixels inside of the mask."""
    if width == 0:
        return share
    distance = cv2.distanceTransform((share > 0).astype(np.uint8), cv2.DIST_L2, 5)
    return share * np.minimum(distance / (width + 1), 1).astype(np.float32)


def with_hidden(path: str, map_: np.ndarray, condition: Condition, painting: Painting | None) -> np.ndarray:
    """A map (H, W, 3) uint8 on the canvas with a fourth channel: 255 where it is seen, 0 where it hides the picture,
    which is what a painting makes anew, or what the condition hides. Raises InputError if nothing is hidden."""
    height, width = map_.shape[:2]
    if painting is not None:
        _, hidden = painting.on_canvas((width, height))
    else:
        seen = condition.seen
        if seen is None or seen.min() > 127:
            raise InputError(
                f"{path}: kind=inpaint hides nothing: expected --init and --mask, or a transparent part",
                "--init photo.jpg --mask mask.png --cond @init,kind=inpaint",
            )
        hidden = fit((seen < 128).astype(np.uint8) * 255, (width, height), "stretch") > 0
    return np.dstack([map_, np.where(hidden, 0, 255).astype(np.uint8)])
