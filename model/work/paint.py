"""A part of a photo made anew: its mask, and the result laid over the photo, of which the rest stays byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from controlnet.model.work.jobs import ALPHA, Job
from controlnet.preprocessors.data.check import same_aspect
from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import read_bytes, read_image, read_rgba
from controlnet.preprocessors.metadata import sha256


@dataclass(frozen=True, eq=False)
class Painting:
    """A photo (H, W, 3) uint8 and how much of each pixel is made anew, (H, W) float32 in [0, 1]."""

    photo: np.ndarray
    share: np.ndarray
    mask_sha256: str

    def on_canvas(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The photo (H, W, 3) uint8 and where it is made anew, (H, W) bool, on a canvas (width, height)."""
        touched = fit((self.share > 0).astype(np.uint8) * 255, size, "stretch")
        return fit(self.photo, size, "stretch"), touched > 0

    def laid_over(self, image: np.ndarray) -> np.ndarray:
        """The photo with an image of the canvas in its place, at the photo's own size."""
        height, width = self.share.shape
        new = fit(image, (width, height), "stretch").astype(np.float32)
        share = self.share[..., None]
        mixed = np.rint(self.photo + share * (new - self.photo)).clip(0, 255).astype(np.uint8)
        return np.where(share > 0, mixed, self.photo)


def read_painting(job: Job, size: tuple[int, int], say: Callable[[str], None]) -> Painting:
    """What a job paints. Raises InputError for a mask that is one colour or cannot be read, UsageError for a canvas of
    another aspect than the photo."""
    assert job.init is not None and job.mask is not None
    data = read_bytes(job.init)
    photo, _ = read_image(data, job.init)
    height, width = photo.shape[:2]
    if not same_aspect(size, (width, height), tolerance=0.05):
        raise UsageError(
            f"a canvas of {size[0]}x{size[1]} to paint on {job.init} of {width}x{height}: expected the photo's aspect",
            "no --size, or one of the photo's aspect",
        )
    if job.mask == ALPHA:
        rgba = read_rgba(data)
        if rgba is None:
            raise InputError(f"{job.init}: has no transparency for --mask {ALPHA}", "--mask mask.png")
        photo, mask, digest = rgba[..., :3], 255 - rgba[..., 3], sha256(data)  # the colours under the transparency
    else:
        mask, digest = _read_mask(job.mask, say)
    if mask.shape != (height, width):
        say(f"{job.mask}: mask of {mask.shape[1]}x{mask.shape[0]} brought to the photo's {width}x{height}")
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
    share = _share(255 - mask if job.invert_mask else mask)
    if share.min() == 1 or share.max() == 0:
        what = "all of it is" if share.min() == 1 else "nothing is"
        hint = "leave --mask out" if share.min() == 1 else "white is made anew; --invert-mask exchanges black and white"
        raise InputError(f"{job.mask}: {what} to be made anew", hint)
    return Painting(photo, _feathered(share, job.feather), digest)


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
