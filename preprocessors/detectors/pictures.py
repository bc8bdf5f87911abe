"""Maps that are the photo itself, changed: tile, shuffle, inpaint, recolor, blur, ip2p. No weights."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.geometry import Box


@dataclass(frozen=True)
class PictureOptions:
    pass


@dataclass(frozen=True)
class TileOptions:
    down: float = 1.0
    """Shrink the photo so many times and enlarge it again, so that its details are invented anew (1 to 64)."""

    def __post_init__(self):
        if not 1 <= self.down <= 64:
            raise UsageError(f"down={self.down:g}: expected 1 to 64", "controlnet detect tile PHOTO --down 4")


@dataclass(frozen=True)
class ShuffleOptions:
    flow: int = 256
    """How far colours flow, in pixels (8 to 2048)."""
    seed: int = 0
    """Another number is another flow."""

    def __post_init__(self):
        if not 8 <= self.flow <= 2048 or self.seed < 0:
            raise UsageError(
                f"flow={self.flow}, seed={self.seed}: expected a flow of 8 to 2048 and a seed of 0 or more",
                "controlnet detect shuffle PHOTO --flow 256 --seed 0",
            )


@dataclass(frozen=True)
class InpaintOptions:
    mask: str = ""
    """A picture of the photo's size: what is white in it is hidden."""
    box: str = "0.25,0.25,0.75,0.75"
    """Without a mask, the part to hide: left, top, right and bottom as fractions."""

    def __post_init__(self):
        parse_box(self.box)


@dataclass(frozen=True)
class RecolorOptions:
    gamma: float = 1.0
    """Above 1 darker, below 1 lighter (0.1 to 10)."""

    def __post_init__(self):
        if not 0.1 <= self.gamma <= 10:
            raise UsageError(f"gamma={self.gamma:g}: expected 0.1 to 10", "controlnet detect recolor PHOTO --gamma 1")


@dataclass(frozen=True)
class BlurOptions:
    sigma: float = 9.0
    """Of the blur, in pixels (0.1 to 100)."""

    def __post_init__(self):
        if not 0.1 <= self.sigma <= 100:
            raise UsageError(f"sigma={self.sigma:g}: expected 0.1 to 100", "controlnet detect blur PHOTO --sigma 9")


def itself(image: np.ndarray, options: PictureOptions = PictureOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> the same."""
    return image


def tile(image: np.ndarray, options: TileOptions = TileOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W, 3) uint8: shrunk by area averaging and enlarged again, as ControlNet 1.1's tile
    network was trained."""
    if options.down == 1:
        return image
    height, width = image.shape[:2]
    small = [max(1, round(side / options.down)) for side in (width, height)]
    return cv2.resize(
        cv2.resize(image, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_CUBIC
    )


def shuffle(image: np.ndarray, options: ShuffleOptions = ShuffleOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W, 3) uint8: each pixel from another place, given by smooth noise, as in
    controlnet-aux's ContentShuffleDetector."""
    height, width = image.shape[:2]
    noise = np.random.default_rng(options.seed)
    across, down = (_smooth(noise, height, width, options.flow) * (side - 1) for side in (width, height))
    return cv2.remap(image, across, down, cv2.INTER_LINEAR)


def inpaint(image: np.ndarray, options: InpaintOptions, mask: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB, and a mask of that size -> (H, W, 4) uint8, transparent where the photo is hidden. Raises
    InputError where nothing is."""
    height, width = image.shape[:2]
    if mask is None:
        left, top, right, bottom = parse_box(options.box)
        hidden = np.zeros((height, width), bool)
        hidden[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    else:
        hidden = mask.mean(2) > 127
    if not hidden.any():
        raise InputError("nothing is hidden", "--mask with something white, or a larger --box")
    return np.dstack([image, np.where(hidden, 0, 255).astype(np.uint8)])


def luminance(image: np.ndarray, options: RecolorOptions = RecolorOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8: CIE lightness."""
    return _gamma(cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0], options.gamma)


def intensity(image: np.ndarray, options: RecolorOptions = RecolorOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8: the greatest of the three channels."""
    return _gamma(image.max(axis=2), options.gamma)


def blur(image: np.ndarray, options: BlurOptions = BlurOptions()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W, 3) uint8."""
    return cv2.GaussianBlur(image, (0, 0), options.sigma)


def parse_box(text: str) -> Box:
    """`left,top,right,bottom`, fractions of the picture. Raises UsageError unless they enclose something."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"box {text!r}: expected four numbers, left,top,right,bottom", "--box 0.25,0.25,0.75,0.75"
        ) from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UsageError(
            f"box {text!r}: expected 0 <= left < right <= 1 and 0 <= top < bottom <= 1", "--box 0.25,0.25,0.75,0.75"
        )
    return left, top, right, bottom


def _gamma(grey: np.ndarray, gamma: float) -> np.ndarray:
    return np.rint((grey / 255.0) ** gamma * 255).astype(np.uint8)


def _smooth(noise: np.random.Generator, height: int, width: int, size: int) -> np.ndarray:
    """(H, W) float32 from 0 to 1 that changes over about `size` pixels."""
    coarse = noise.random((height // size + 2, width // size + 2), np.float32)
    fine = cv2.resize(coarse, (width + 2 * size, height + 2 * size), interpolation=cv2.INTER_CUBIC)
    fine = fine[size : size + height, size : size + width]
    return (fine - fine.min()) / max(float(np.ptp(fine)), 1e-9)
