"""Detectors from controlnet-aux, for rows of the registry: its networks, its weights, its results.

Imported only when one of them is asked for: controlnet-aux takes seconds to import.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors.hed import SoftEdgeOptions
from controlnet.preprocessors.errors import InputError, ModelError, NothingFoundError, reason
from controlnet.preprocessors.skeleton import JOINTS, draw, to_text

MOST = 12_000_000
"""The most pixels of a picture for networks that process it as a whole."""


@dataclass(frozen=True)
class OpenposeOptions:
    allow_empty: bool = False
    """Where nobody is found, make a black map instead of an error."""


def openpose(image: np.ndarray, options: OpenposeOptions, weights: Path) -> tuple[np.ndarray, dict]:
    """People by OpenPose's own network: the map (H, W, 3) uint8 and its key points. Raises NothingFoundError for a
    photo without people, unless allow_empty."""
    found = load_detector("OpenposeDetector", weights).detect_poses(image, include_hand=False, include_face=False)
    people = []
    for pose in found:
        joints = [(k.x, k.y, 1.0) if k is not None else (0.0, 0.0, 0.0) for k in pose.body.keypoints]
        people.append(np.array(joints[: len(JOINTS)]))
    if not people and not options.allow_empty:
        raise NothingFoundError("nobody found", "--detector blazepose, or --allow-empty for a black map")
    keypoints = to_text(people)
    return draw([np.array(person) for person in keypoints], (image.shape[1], image.shape[0])), {"keypoints": keypoints}


def pidinet(image: np.ndarray, options: SoftEdgeOptions, weights: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8: soft edges by PiDiNet."""
    height, width = image.shape[:2]
    side = min(height, width)
    if side < 64:
        raise InputError(
            f"{width}x{height} is too small for PiDiNet, expected at least 64 pixels per side", "--size 512"
        )
    if width * height > MOST:
        fits = int((MOST / (width * height)) ** 0.5 * side) // 8 * 8
        raise InputError(
            f"{width}x{height}: PiDiNet needs some 600 bytes per pixel; at most {MOST // 10**6} million of them",
            f"--size {fits}, or --detector hed, which works in tiles",
        )
    made = load_detector("PidiNetDetector", weights)(
        image, detect_resolution=side, image_resolution=side, output_type="np", safe=options.safe
    )
    # PiDiNet works at multiples of 64 pixels.
    return cv2.resize(np.ascontiguousarray(made[..., 0]), (width, height), interpolation=cv2.INTER_LINEAR)


@cache
def load_detector(name: str, weights: Path):
    """A detector of controlnet-aux, by the name of its class. Raises ModelError for weights that it cannot read."""
    with warnings.catch_warnings():  # from the libraries that it imports, about each other
        warnings.simplefilter("ignore")
        import controlnet_aux
    try:
        return getattr(controlnet_aux, name).from_pretrained(str(weights))
    except Exception as error:  # whatever torch and the networks raise for a wrong file
        raise ModelError(
            f"{weights}: are not the weights of {name} ({reason(error)[:200]})", "--weights DIR"
        ) from error
