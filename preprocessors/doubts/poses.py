"""Poses: coloured limbs, between the joints that they join."""

from __future__ import annotations

import numpy as np
from controlnet.preprocessors.doubts.look import Doubt, Look
from controlnet.preprocessors.kinds import PEOPLE
from controlnet.preprocessors.skeleton import COLOURS, LIMBS


def without_skeleton(look: Look) -> Doubt | None:
    if look.kind.form != PEOPLE or has_skeleton(look.map):
        return None
    return Doubt(
        "no skeleton", "not a coloured skeleton on black, which the kind pose is", "controlnet detect pose PHOTO"
    )


def exchanged(look: Look) -> Doubt | None:
    if look.kind.form != PEOPLE or not red_and_blue_exchanged(look.map):
        return None
    return Doubt(
        "red and blue exchanged",
        "its limbs do not lie between their joints: BGR was taken for RGB",
        "exchange red and blue: image[..., ::-1]",
        lambda: np.ascontiguousarray(look.map[..., ::-1]),
    )


def has_skeleton(condition: np.ndarray) -> bool:
    """Whether a map (H, W, 3) uint8 is mostly black and coloured where it is not."""
    lit = condition.max(2) > 30
    colour = np.ptp(condition[lit], axis=1).mean() if lit.any() else 255
    return bool(lit.mean() < 0.5 and colour > 60)


def red_and_blue_exchanged(condition: np.ndarray) -> bool:
    """Whether a pose map (H, W, 3) uint8 has its colours as BGR. OpenPose's colours are a circle of hues, so exchanging
    two channels gives the same set of colours; but then limbs no longer lie between the joints that they join."""
    off, found = _off_joints(condition)
    off_exchanged, found_exchanged = _off_joints(condition[..., ::-1])
    return found_exchanged >= 3 and (found < 3 or off > max(0.05, 3 * off_exchanged))


def _off_joints(condition: np.ndarray) -> tuple[float, int]:
    """The mean distance of limbs from the middle of their two joints, as a fraction of the picture; and how many
    limbs."""
    joints = [_place_of(condition, colour) for colour in COLOURS]
    off = []
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        limb, one, other = _place_of(condition, tuple(0.6 * c for c in colour)), joints[a], joints[b]
        if limb is not None and one is not None and other is not None:
            off.append(float(np.abs(limb - (one + other) / 2).max()))
    return float(np.mean(off)) if off else 0.0, len(off)


def _place_of(condition: np.ndarray, colour: tuple[float, ...]) -> np.ndarray | None:
    """Mean row and column of the pixels of a colour, as fractions of the picture; None if there are none."""
    near = (np.abs(condition.astype(np.int16) - np.rint(colour).astype(np.int16)) <= 20).all(2)
    return np.argwhere(near).mean(0) / condition.shape[:2] if near.any() else None
