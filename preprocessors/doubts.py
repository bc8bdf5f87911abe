"""Conditions that are probably wrong, noticed before a network wastes its time on them.

Nothing here is certain: a doubt is a warning with a cure, and an error only on request (--strict). How often each one
is right is in benchmarks/LOG.md (`python benchmarks/doubts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from controlnet.preprocessors.kinds import HARD_LINES, PEOPLE, kind_named
from controlnet.preprocessors.skeleton import COLOURS, LIMBS

FLAT = 8
"""A map whose levels differ by less is empty."""
STRETCH = 0.05
"""How much aspects may differ (natural logarithm of their ratio)."""
GREY_SHARE = 0.35
"""Share of a line map's lit pixels that may be grey: resizing makes some."""
FAR_FROM_CANVAS = (0.5, 16)
"""The range allowed for a map's shorter side over the canvas's: below it lines become blocks, above it they run
together."""


_DETECT_POSE = "controlnet detect pose PHOTO"


@dataclass(frozen=True)
class Doubt:
    """`what` names the fault in the same words for every map, `text` describes it, `cure` says what to do."""

    what: str
    text: str
    cure: str


def doubts(condition: np.ndarray, kind: str, size: tuple[int, int] | None = None) -> list[Doubt]:
    """What looks wrong with a condition (H, W, 3) uint8 of a kind, for a canvas or picture of `size` (width,
    height)."""
    found = []
    row = kind_named(kind)
    height, width = condition.shape[:2]

    # What is in it: nothing, or lines of the wrong sort.
    if int(condition.max()) - int(condition.min()) < FLAT:
        found.append(Doubt("empty condition", "one flat colour: there is nothing to follow", "make the map again"))
    elif row.is_lines and condition.mean() > 127:
        found.append(Doubt("inverted lines", "mostly white; lines must be white on black", "invert the map's colours"))
    elif row.form == HARD_LINES and (share := grey_share(condition)) > GREY_SHARE:
        found.append(
            Doubt(
                "grey lines",
                f"{share:.0%} of its lines are grey; {kind} has white ones alone",
                "kind=softedge if they are soft edges; else make the map again, as a PNG at its final size",
            )
        )

    # A pose: coloured limbs, between the joints that they join.
    if row.form == PEOPLE and not has_skeleton(condition):
        found.append(Doubt("no skeleton", "not a coloured skeleton on black, which the kind pose is", _DETECT_POSE))
    elif row.form == PEOPLE and red_and_blue_exchanged(condition):
        found.append(
            Doubt(
                "red and blue exchanged",
                "its limbs do not lie between their joints: BGR was taken for RGB",
                "exchange red and blue: image[..., ::-1]",
            )
        )

    # Its size, compared with the canvas's.
    if size is not None and not FAR_FROM_CANVAS[0] <= min(width, height) / min(size) <= FAR_FROM_CANVAS[1]:
        found.append(
            Doubt(
                "another size",
                f"{width}x{height} is far from the canvas {size[0]}x{size[1]}",
                f"--size {size[0]}x{size[1]} when the map is made",
            )
        )
    if size is not None and abs(np.log(width / height * size[1] / size[0])) > STRETCH:
        found.append(
            Doubt(
                "another aspect",
                f"{width}x{height} is stretched to the canvas {size[0]}x{size[1]}",
                f"--size {size[0]}x{size[1]} when the map is made",
            )
        )
    return found


def has_skeleton(condition: np.ndarray) -> bool:
    """Whether a map (H, W, 3) uint8 is mostly black and coloured where it is not."""
    lit = condition.max(2) > 30
    colour = np.ptp(condition[lit], axis=1).mean() if lit.any() else 255
    return bool(lit.mean() < 0.5 and colour > 60)


def grey_share(condition: np.ndarray) -> float:
    """Share of the lit pixels of a map (H, W, 3) uint8 that are neither black nor white."""
    light = condition.max(axis=2)
    lit = light > 30
    return float(((light < 225) & lit).sum() / max(1, lit.sum()))


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
