"""What a horizontal flip does to a pair: the picture, its condition and its caption change together."""

from __future__ import annotations

import re

import numpy as np
from controlnet.preprocessors.errors import UsageError

_SWAP = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}


def flip_words(caption: str) -> str:
    """The caption of the mirrored picture: left and right change places."""
    return re.sub(r"\b(left|right)\b", lambda word: _SWAP.get(word[0], word[0]), caption, flags=re.IGNORECASE)


def flip_condition(condition: np.ndarray, kind: str, name: str = "condition") -> np.ndarray:
    """The condition (H, W, 3) uint8 of the mirrored picture. In a normal map the x direction, red, changes its sign
    too; a kind of one's own is mirrored as a picture. Raises UsageError for a pose without key points: its left and
    right limbs have colours of their own, so it is drawn anew from them (preprocessors.skeleton)."""
    if kind == "pose":
        raise UsageError(f"{name}: a pose map without key points in its PNG text cannot be mirrored",
                         "--set flip=false, or maps made by controlnet detect pose")  # fmt: skip
    flipped = np.ascontiguousarray(condition[:, ::-1])
    if kind == "normal":
        flipped[..., 0] = 255 - flipped[..., 0]
    return flipped
