"""What a horizontal flip does to a pair: the picture, its condition and its caption change together."""

from __future__ import annotations

import re

import numpy as np
from controlnet.preprocessors.errors import UsageError

FLIP_KINDS = ("canny", "softedge", "scribble", "lineart", "mlsd", "depth", "normal", "seg", "pose")
"""Kinds that can be mirrored. A pose cannot as a picture, as left and right limbs have colours of their own: it is
drawn anew from its key points (preprocessors.skeleton)."""
_SWAP = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}


def flip_words(caption: str) -> str:
    """The caption of the mirrored picture: left and right change places."""
    return re.sub(r"\b(left|right)\b", lambda word: _SWAP.get(word[0], word[0]), caption, flags=re.IGNORECASE)


def flip_condition(condition: np.ndarray, kind: str, name: str = "condition") -> np.ndarray:
    """The condition (H, W, 3) uint8 of the mirrored picture. In a normal map the x direction, red, changes its sign
    too. Raises UsageError for a kind that a flip would make wrong, and for a pose without key points."""
    if kind == "pose":
        raise UsageError(f"{name}: a pose map without key points in its PNG text cannot be mirrored",
                         "--set flip=false, or maps made by controlnet detect pose")  # fmt: skip
    if kind not in FLIP_KINDS:
        raise UsageError(f"a {kind} map cannot be mirrored as a picture", "--set flip=false")
    flipped = np.ascontiguousarray(condition[:, ::-1])
    if kind == "normal":
        flipped[..., 0] = 255 - flipped[..., 0]
    return flipped
