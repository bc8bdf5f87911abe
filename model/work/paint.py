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
from controlnet.preprocessors.images import alpha_of, read_bytes, read_image
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
            f"--size {size[0]}x{size[1]} with --mask: the photo is {width}x{height}, of another aspect",
            "leave --size out",
        )
    mask, digest = _mask(job, data, say)
    if mask.shape != (height, width):
        say(f"{job.mask}: mask of {mask.shape[1]}x{mask.shape[0]} brought to the photo's {width}x{height}")
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
    anew = (mask <= 127) if job.invert_mask else (mask > 127)
    if anew.all() or not anew.any():
        what = "all of it is" if anew.all() else "nothing is"
        hint = "leave --mask out" if anew.all() else "white is made anew; --invert-mask exchanges black and white"
        raise InputError(f"{job.mask}: {what} to be made anew", hint)
    return Painting(photo, _feathered(anew, job.feather), digest)


def _mask(job: Job, photo: bytes, say: Callable[[str], None]) -> tuple[np.ndarray, str]:
    """(H, W) uint8, white where the photo is made anew; and the sha256 of its file."""
    assert job.init is not None and job.mask is not None
    if job.mask != ALPHA:
        data = read_bytes(job.mask)
        return read_image(data, job.mask, say)[0].max(2), sha256(data)
    alpha = alpha_of(photo)
    if alpha is None:
        raise InputError(f"{job.init}: has no transparency for --mask {ALPHA}", "--mask mask.png")
    return 255 - alpha, sha256(photo)


def _feathered(anew: np.ndarray, width: int) -> np.ndarray:
    """1 inside of the mask and 0 outside, rising over `width` pixels inside."""
    if width == 0:
        return anew.astype(np.float32)
    distance = cv2.distanceTransform(anew.astype(np.uint8), cv2.DIST_L2, 5)
    return np.minimum(distance / (width + 1), 1).astype(np.float32)
