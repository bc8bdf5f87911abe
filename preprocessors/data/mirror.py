"""What cropping and mirroring do to a pair: the picture, its condition and its caption change together."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.kinds import PEOPLE, kind_named
from controlnet.preprocessors.skeleton import cut_people, draw, mirror

_SWAP = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}


def flip_words(caption: str) -> str:
    """The caption of the mirrored picture: left and right change places."""
    return re.sub(r"\b(left|right)\b", lambda word: _SWAP.get(word[0], word[0]), caption, flags=re.IGNORECASE)


def cut_condition(condition: Condition, part: np.ndarray, window: tuple[float, float, float, float]) -> Condition:
    """The condition cut to a window (left, top, width and height as fractions of the whole); `part` is its map
    there."""
    people = condition.people
    return replace(condition, map=part, people=people and cut_people(people, *window))


def flip_condition(condition: Condition) -> Condition:
    """The condition of the mirrored picture. A pose is drawn anew, since its left and right limbs have different
    colours. In a normal map the x direction, red, also changes its sign; a user's own kind is mirrored as a picture.
    Raises UsageError for a pose without key points."""
    row = kind_named(condition.kind)
    people = condition.people
    if people is not None:
        mirrored = mirror(people)
        return replace(condition, map=draw(mirrored, condition.size), people=mirrored)
    if row.form == PEOPLE:
        raise UsageError(
            f"{condition.name}: a pose map without key points in its PNG text cannot be mirrored",
            "--set flip=false, or maps made by controlnet detect pose",
        )
    flipped = np.ascontiguousarray(condition.map[:, ::-1])
    if row.signed_x:
        flipped[..., 0] = 255 - flipped[..., 0]
    return replace(condition, map=flipped)
