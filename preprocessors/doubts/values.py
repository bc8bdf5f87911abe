"""Maps whose numbers mean something: depth, normals, classes."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from controlnet.preprocessors.doubts.look import Doubt, Look
from controlnet.preprocessors.kinds import PALETTE
from controlnet.preprocessors.palette import coloured, nearest

FLAT = 8
"""A map whose levels differ by less is empty."""
COLOUR = 16
"""How far the channels of a depth map may differ on average."""
REVERSED = -0.25
"""The correlation of a depth map's lightness with the height in the picture, downwards, below which near is probably
black: floors are near at the bottom, skies and walls far at the top."""
EXCHANGED = 20
"""Levels by which a normal map's red may exceed its blue on average: what is seen faces the viewer."""
UNIT = (0.25, 0.6)
"""How far a normal's length may be from 1, and the least share of pixels where it is not."""
OFF, OFF_SHARE = 8, 0.05
"""How far a colour may be from the palette's nearest, in levels, and the share of pixels that may be farther."""
COLOUR_MAPS = ("INFERNO", "MAGMA", "PLASMA", "VIRIDIS", "TURBO", "JET", "HOT", "BONE", "CIVIDIS")
"""OpenCV's names of the colour maps in which depth is often shown."""
LIKE_A_COLOUR_MAP = 12
"""The mean distance, in levels, up to which a picture is one in a colour map."""


def is_flat(map_: np.ndarray) -> bool:
    """Whether a map (H, W, C) uint8 shows nothing."""
    return int(map_.max()) - int(map_.min()) < FLAT


def empty(look: Look) -> Doubt | None:
    if not is_flat(look.map):
        return None
    return Doubt("empty condition", "one flat colour: there is nothing to follow", "make the map again")


def coloured_depth(look: Look) -> Doubt | None:
    if look.kind.score != "depth" or np.ptp(look.map, axis=2).mean() <= COLOUR:
        return None
    name, levels, far = _in_colour_map(look.map)
    if far > LIKE_A_COLOUR_MAP:
        return Doubt(
            "coloured depth", "is coloured: depth is grey, near is white", f"controlnet detect {look.kind.name} PHOTO"
        )
    return Doubt(
        "coloured depth",
        f"is coloured, as by the colour map {name.lower()}: depth is grey, near is white",
        "save it without the colour map",
        lambda: np.repeat(levels[..., None], 3, 2),
    )


def reversed_depth(look: Look) -> Doubt | None:
    if look.kind.score != "depth":
        return None
    light = look.map.mean(axis=2)
    rows = np.broadcast_to(np.arange(light.shape[0])[:, None], light.shape)
    if light.std() < 1 or np.corrcoef(light.ravel(), rows.ravel())[0, 1] >= REVERSED:
        return None
    return Doubt(
        "reversed depth",
        "it grows lighter upwards: near may be black in it, and must be white",
        "controlnet check MAP --fix inverts it, if so",
        lambda: 255 - look.map,
        certain=False,
    )


def exchanged_normals(look: Look) -> Doubt | None:
    if not look.kind.signed_x or look.map[..., 0].mean() - look.map[..., 2].mean() <= EXCHANGED:
        return None
    return Doubt(
        "red and blue exchanged",
        "its red, not its blue, faces the viewer: BGR was taken for RGB",
        "exchange red and blue: image[..., ::-1]",
        lambda: np.ascontiguousarray(look.map[..., ::-1]),
    )


def not_normals(look: Look) -> Doubt | None:
    if not look.kind.signed_x:
        return None
    lengths = np.linalg.norm(look.map / 127.5 - 1, axis=2)
    if (np.abs(lengths - 1) <= UNIT[0]).mean() >= UNIT[1]:
        return None
    return Doubt(
        "no normal map",
        "its colours are no directions: x, y and z of length 1, from 0 to 255",
        f"controlnet detect {look.kind.name} PHOTO",
    )


def off_palette(look: Look) -> Doubt | None:
    if look.kind.form != PALETTE:
        return None
    classes, far = nearest(look.map)
    share = float((far > OFF).mean())
    if share <= OFF_SHARE:
        return None
    turned, far_turned = nearest(np.ascontiguousarray(look.map[..., ::-1]))
    if (far_turned > OFF).mean() <= OFF_SHARE:
        return Doubt(
            "red and blue exchanged",
            "its colours are those of the palette as BGR",
            "exchange red and blue: image[..., ::-1]",
            lambda: coloured(turned),
        )
    return Doubt(
        "colours beyond the palette",
        f"{share:.0%} of it is in none of ADE20K's 150 colours: a JPEG, another palette, or a photo",
        "save it as PNG, enlarged by nearest neighbour; in the colours of controlnet detect seg",
        lambda: coloured(classes),
    )


def _in_colour_map(map_: np.ndarray) -> tuple[str, np.ndarray, float]:
    """The colour map that a picture (H, W, 3) is nearest to: its name, the levels (H, W) uint8, the mean distance."""
    small = cv2.resize(map_, (32, 32), interpolation=cv2.INTER_NEAREST)
    name = min(COLOUR_MAPS, key=lambda one: _levels(small, one)[1])
    return name, *_levels(map_, name)


def _levels(map_: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """The levels (H, W) uint8 whose colours are nearest to those of a picture, and how far they are on average."""
    colours = _colours(name)
    own, back = np.unique(map_.reshape(-1, 3), axis=0, return_inverse=True)
    wanted = own.astype(np.float32)
    nearest_ = ((colours**2).sum(1) - 2 * wanted @ colours.T).argmin(1)
    far = np.abs(wanted - colours[nearest_]).max(1)
    return nearest_[back].reshape(map_.shape[:2]).astype(np.uint8), float(far[back].mean())


@cache
def _colours(name: str) -> np.ndarray:
    """(256, 3) float32 RGB."""
    ramp = np.arange(256, dtype=np.uint8)[None]
    return cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{name}"))[0, :, ::-1].astype(np.float32)
