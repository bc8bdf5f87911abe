"""Stage one: photo -> condition map, with the record of how it was made."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from functools import cache

import cv2
import numpy as np
from controlnet.preprocessors.detectors.registry import Detector, Maker
from controlnet.preprocessors.geometry import fit


@cache
def version() -> str:
    """Of this package; 'unknown' when it runs from a plain folder."""
    try:
        return importlib.metadata.version("controlnet-toolkit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def detect(image: np.ndarray, make: Maker, size: tuple[int, int], resize: str) -> tuple[np.ndarray, dict]:
    """The map of a photo (H, W, 3) uint8 RGB, and what else is known of it: the photo is brought to the map's size
    first, then looked at in that size."""
    return make(fit(image, size, resize))


def rgb(map_: np.ndarray) -> np.ndarray:
    """A map (H, W) or (H, W, 3) as (H, W, 3)."""
    return map_ if map_.ndim == 3 else np.repeat(map_[..., None], 3, 2)


def record(detector: Detector, options, size: tuple[int, int], resize: str, name: str, source: str) -> dict:
    """What a map's PNG text says of its making; `source` is the sha256 of the photo's file."""
    return {
        "kind": detector.kind,
        "detector": detector.name,
        "options": asdict(options),
        "resize": resize,
        "size": list(size),
        "source": name,
        "source_sha256": source,
        "versions": {"controlnet": version(), "opencv": cv2.__version__},
    }
