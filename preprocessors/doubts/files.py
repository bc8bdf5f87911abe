"""What a map's file says of it: transparency, kind, origin, size."""

from __future__ import annotations

import math
import re

import numpy as np
from controlnet.preprocessors.doubts.look import Doubt, Look
from controlnet.preprocessors.kinds import KINDS, PICTURE, stands_in

STRETCH = 0.05
"""How much aspects may differ (natural logarithm of their ratio)."""
FAR_FROM_CANVAS = (0.5, 16)
"""The range allowed for a map's shorter side over the canvas's: below it lines become blocks, above it they run
together."""
PHOTO_LIKE = ("tile", "ip2p", "shuffle", "recolor", "blur", "inpaint")
"""Kinds whose maps are photos: any map can be one."""


def transparent(look: Look) -> Doubt | None:
    if look.alpha is None or look.kind.hides or int(look.alpha.min()) > 250:
        return None
    alpha = look.alpha[..., None] / 255.0

    def over_black() -> np.ndarray:
        # What is transparent was laid over white: map = colour * alpha + 255 * (1 - alpha).
        black = np.rint((look.map - 255.0 * (1 - alpha)).clip(0, 255)).astype(np.uint8)
        return black if np.ptp(black) else look.map  # black lines on nothing: seen on white alone

    ground = "white" if look.kind.form == PICTURE else "white, and these maps are on black"
    return Doubt(
        "transparency", f"has transparent parts, which are read as {ground}", "lay it over black", over_black, False
    )


def of_another_kind(look: Look) -> Doubt | None:
    own = look.record.get("kind")
    if not isinstance(own, str) or stands_in(own, look.kind.name):
        return None
    return Doubt("another kind", f"its own text says that it is a {own} map, not {look.kind.name}", f"kind={own}")


def map_of_a_map(look: Look) -> Doubt | None:
    source = look.record.get("source")
    found = re.search(rf"\.({'|'.join(KINDS)})\.png$", source) if isinstance(source, str) else None
    if found is None or look.kind.name in PHOTO_LIKE or found[1] in PHOTO_LIKE:
        return None
    return Doubt(
        "map of a map",
        f"was made from {source}, which is a map itself",
        f"controlnet detect {look.kind.name} PHOTO",
        certain=False,
    )


def of_another_size(look: Look) -> Doubt | None:
    height, width = look.map.shape[:2]
    if look.size is None or FAR_FROM_CANVAS[0] <= min(width, height) / min(look.size) <= FAR_FROM_CANVAS[1]:
        return None
    wanted = f"{look.size[0]}x{look.size[1]}"
    return Doubt(
        "another size", f"{width}x{height} is far from the canvas {wanted}", f"--size {wanted} when the map is made"
    )


def of_another_aspect(look: Look) -> Doubt | None:
    height, width = look.map.shape[:2]
    if look.size is None or abs(math.log(width / height * look.size[1] / look.size[0])) <= STRETCH:
        return None
    wanted = f"{look.size[0]}x{look.size[1]}"
    return Doubt(
        "another aspect",
        f"{width}x{height} is stretched to the canvas {wanted}",
        f"--size {wanted} when the map is made",
    )
