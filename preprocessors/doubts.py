"""Conditions that are probably wrong, told before a network wastes its time on them.

Nothing here is certain: a doubt is a warning with its cure, and an error only where one asks for it (--strict). How
often each one is right stands in benchmarks/LOG.md (`python benchmarks/doubts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from controlnet.preprocessors.skeleton import COLOURS, JOINTS

LINES = ("canny", "softedge", "scribble", "lineart", "mlsd")
"""Kinds that are white lines on black."""
HARD_LINES = ("canny", "mlsd")
"""Those of them that know no grey."""
FLAT = 8
"""A map whose levels differ by less says nothing."""
STRETCH = 0.05
"""Aspects may differ by so much (natural logarithm of their ratio)."""
GREY_SHARE = 0.35
"""Share of a line map's lit pixels that may be grey: resizing makes some."""
EXCHANGED = (("nose", "left knee"), ("neck", "left hip"), ("right shoulder", "right ankle"),
             ("right elbow", "right knee"))  # fmt: skip
"""Joints whose colours are each other's with red and blue exchanged; the first one is mostly the higher one."""


@dataclass(frozen=True)
class Doubt:
    """`what` names the fault (the same for every map), `text` says it, `cure` what to do."""

    what: str
    text: str
    cure: str


def doubts(condition: np.ndarray, kind: str, size: tuple[int, int] | None = None) -> list[Doubt]:
    """What looks wrong with a condition (H, W, 3) uint8 of a kind, for a canvas or picture of `size` (width,
    height)."""
    found = []
    height, width = condition.shape[:2]
    if int(condition.max()) - int(condition.min()) < FLAT:
        found.append(Doubt("empty condition", "one flat colour: there is nothing to follow", "make the map again"))
    elif kind in LINES and condition.mean() > 127:
        found.append(Doubt("inverted lines", "mostly white; lines must be white on black", "invert the map's colours"))
    elif kind in HARD_LINES and (share := grey_share(condition)) > GREY_SHARE:
        found.append(
            Doubt("grey lines", f"{share:.0%} of its lines are grey; {kind} has white ones alone",
                  "kind=softedge if they are soft edges; else make the map again, as a PNG at its final size")
        )  # fmt: skip
    if kind == "pose" and red_and_blue_exchanged(condition):
        found.append(
            Doubt("red and blue exchanged", "head and legs have each other's colours: BGR was taken for RGB",
                  "exchange red and blue: image[..., ::-1]")
        )  # fmt: skip
    if size is not None and abs(np.log(width / height * size[1] / size[0])) > STRETCH:
        found.append(Doubt("another aspect", f"{width}x{height} is stretched to the canvas {size[0]}x{size[1]}",
                           f"--size {size[0]}x{size[1]} when the map is made"))  # fmt: skip
    return found


def grey_share(condition: np.ndarray) -> float:
    """Share of the lit pixels of a map (H, W, 3) uint8 that are neither black nor white."""
    light = condition.max(axis=2)
    lit = light > 30
    return float(((light < 225) & lit).sum() / max(1, lit.sum()))


def red_and_blue_exchanged(condition: np.ndarray) -> bool:
    """Whether a pose map (H, W, 3) uint8 has its colours as BGR. OpenPose's colours are a circle of hues, so exchanging
    two channels gives the same set of colours; but then the nose lies below the knee."""
    votes = 0
    for upper, lower in EXCHANGED:
        above, below = (_row_of(condition, COLOURS[JOINTS.index(name)]) for name in (upper, lower))
        if above is not None and below is not None:
            votes += 1 if above > below else -1
    return votes > 0


def _row_of(condition: np.ndarray, colour: tuple[int, int, int]) -> float | None:
    """Mean row of the pixels of a joint's colour; None where there are none."""
    near = (np.abs(condition.astype(np.int16) - colour) <= 30).all(2)
    return float(np.flatnonzero(near.any(1)).mean()) if near.any() else None
