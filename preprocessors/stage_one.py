"""Stage one: photo -> condition, with the record of how it was made."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from controlnet.preprocessors.condition import Condition, recorded
from controlnet.preprocessors.detectors.detector import Detector, Ready
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.errors import InputError
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import read_bytes, read_image
from controlnet.preprocessors.metadata import sha256

SAME_ASPECT = 0.02
"""How much the aspect of a second picture may differ from the photo's."""
MAKING = ("kind", "detector", "options", "resize", "size", "source", "source_sha256", "versions")
"""The keys of a condition's record that say how it was made; others say what was found."""


def stage_one(
    photo: np.ndarray | str | Path,
    detector: Ready | str,
    size: tuple[int, int] = (512, 512),
    resize: str = "crop",
    name: str = "photo",
    digest: str = "",
) -> Condition:
    """The condition of a photo, (H, W, 3) uint8 RGB or a file's path.

    The photo is brought to `size` (width, height) first, as `resize` says (geometry.fit), then detected at that size.
    `detector` is a kind (for its default detector and options) or what `Detector.ready` returns. `name` and `digest`,
    the sha256 of the photo's file, go into the record; for a path both are set from the file. Raises InputError for a
    photo that cannot be read, NothingFoundError where a detector finds nothing, ModelError for weights that are not
    available.
    """
    if isinstance(photo, (str, Path)):
        data = read_bytes(str(photo))
        name, digest = Path(photo).name, sha256(data)
        photo, _ = read_image(data, str(photo))
    if isinstance(detector, str):
        row = find_detector(detector)
        detector = row.ready(row.load_options()())
    height, width = photo.shape[:2]

    def place(picture: np.ndarray) -> np.ndarray:
        if abs(picture.shape[1] / picture.shape[0] * height / width - 1) > SAME_ASPECT:
            raise InputError(
                f"{name} is {width}x{height}, and what goes with it {picture.shape[1]}x{picture.shape[0]}: expected the"
                " same aspect",
                "a picture of the photo's size",
            )
        return fit(fit(picture, (width, height), "stretch"), size, resize)

    map_, found = detector(fit(photo, size, resize), place)
    made = record(detector.row, detector.options, (map_.shape[1], map_.shape[0]), resize, name, digest)
    return recorded(map_, detector.row.kind, name, made | found)


def record(row: Detector, options: Any, size: tuple[int, int], resize: str, name: str, digest: str) -> dict[str, Any]:
    """The part of a condition's record that says how it was made; `digest` is the sha256 of the photo's file."""
    return {
        "kind": row.kind,
        "detector": row.name,
        "options": asdict(options) | _second(row, options),
        "resize": resize,
        "size": list(size),
        "source": name,
        "source_sha256": digest,
        "versions": {"controlnet": version(), "opencv": cv2.__version__},
    }


def _second(row: Detector, options: Any) -> dict[str, str]:
    """The sha256 of the file that an option names."""
    path = getattr(options, row.beside) if row.beside else ""
    return {f"{row.beside}_sha256": sha256(read_bytes(path))} if path else {}


@cache
def version() -> str:
    """This package's version; 'unknown' when it runs from a plain folder."""
    try:
        return importlib.metadata.version("controlnet-toolkit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
