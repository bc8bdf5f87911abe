"""Pose maps of photos: people are found, and drawn as OpenPose draws them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from controlnet.preprocessors.detectors.blazepose import BlazePoseOptions, find_people
from controlnet.preprocessors.errors import NothingFoundError
from controlnet.preprocessors.skeleton import draw, to_text


@dataclass(frozen=True)
class PoseOptions(BlazePoseOptions):
    allow_empty: bool = False
    """Where nobody is found, make a black map instead of an error."""


def blazepose(image: np.ndarray, options: PoseOptions, weights: Path) -> tuple[np.ndarray, dict]:
    """(H, W, 3) uint8 RGB -> the map (H, W, 3) uint8, and its key points for the PNG text. Raises NothingFoundError for
    a photo without people, unless allow_empty."""
    people = find_people(image, options, weights)
    if not people and not options.allow_empty:
        raise NothingFoundError(
            f"nobody found (surer than {options.confidence:g})",
            "--confidence 0.3, or a photo that shows more of the person; --allow-empty makes a black map",
        )
    keypoints = to_text(people)  # rounded: what is drawn is what the text says
    return draw([np.array(person) for person in keypoints], (image.shape[1], image.shape[0])), {"keypoints": keypoints}
