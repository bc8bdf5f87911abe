"""Line maps: polarity, colour, grey edges, lines that run beside themselves."""

from __future__ import annotations

import numpy as np
from controlnet.preprocessors.doubts.look import Doubt, Look
from controlnet.preprocessors.kinds import HARD_LINES

GREY_SHARE = 0.35
"""Share of a line map's lit pixels that may be grey: resizing makes some."""
COLOUR = 24
"""How far the channels of a line map's lit pixels may differ on average: JPEG makes some."""
GROUND = 30
"""The level that the darkest 30 % of a line map stay below: at most 24 in 67 soft edge maps, above 30 in nine of ten
photos."""
DOUBLED, DENSE = 0.3, 0.2
"""Black pixels between two white ones, per white pixel, from which lines are doubled: at most 0.23 in 99 of 100 Canny
maps of photos, at least 0.34 in Canny maps of such maps (157 photos). Where more than DENSE of a map is white, lines
are as near to each other by themselves."""


def not_lines(look: Look) -> Doubt | None:
    if not look.kind.is_lines:
        return None
    lit = look.map.max(axis=2) > 30
    coloured = lit.any() and np.ptp(look.map[lit], axis=1).mean() > COLOUR
    full = np.percentile(look.map, 30) > GROUND and look.map.mean() <= 127
    if not coloured and not full:
        return None
    return Doubt(
        "no line map",
        f"is {'coloured' if coloured else 'grey all over'}: a photo, or a map of another kind",
        f"controlnet detect {look.kind.name} PHOTO, or --cond PHOTO,detect={look.kind.name}",
    )


def inverted(look: Look) -> Doubt | None:
    if not look.kind.is_lines or look.map.mean() <= 127:
        return None
    return Doubt(
        "inverted lines",
        "mostly white; lines must be white on black",
        "controlnet check MAP --fix inverts it",
        lambda: 255 - look.map,
    )


def grey(look: Look) -> Doubt | None:
    if look.kind.form != HARD_LINES or (share := grey_share(look.map)) <= GREY_SHARE:
        return None

    def hardened() -> np.ndarray:
        light = look.map.max(axis=2)
        return np.repeat(np.where(light > light.max() / 2, 255, 0).astype(np.uint8)[..., None], 3, 2)

    return Doubt(
        "grey lines",
        f"{share:.0%} of its lines are grey; {look.kind.name} has white ones alone",
        "kind=softedge if they are soft edges; else make the map again, as a PNG at its final size",
        hardened,
        certain=False,
    )


def doubled(look: Look) -> Doubt | None:
    if look.kind.form != HARD_LINES:
        return None
    white = look.map.max(axis=2) > 127
    between = np.zeros_like(white)
    between[1:-1] |= white[:-2] & white[2:]
    between[:, 1:-1] |= white[:, :-2] & white[:, 2:]
    share = float((between & ~white).sum() / max(1, white.sum()))
    if share <= DOUBLED or white.mean() > DENSE:
        return None
    return Doubt(
        "doubled lines",
        "each line runs twice, side by side: edges of a map were taken for those of a photo",
        f"controlnet detect {look.kind.name} PHOTO, not of the map",
        certain=False,
    )


def grey_share(condition: np.ndarray) -> float:
    """Share of the lit pixels of a map (H, W, 3) uint8 that are neither black nor white."""
    light = condition.max(axis=2)
    lit = light > 30
    return float(((light < 225) & lit).sum() / max(1, lit.sum()))
