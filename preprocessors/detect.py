"""Stage one: photo -> condition map, with the record of how it was made."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict

import cv2
import numpy as np
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.metadata import sha256
from controlnet.preprocessors.registry import Detector


def version() -> str:
    """Of this package; 'unknown' when it runs from a plain folder."""
    try:
        return importlib.metadata.version("controlnet-toolkit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def detect(image: np.ndarray, detector: Detector, options, size: tuple[int, int], resize: str) -> np.ndarray:
    """The map of a photo (H, W, 3) uint8 RGB: brought to the map's size first, then detected at that size."""
    return detector.load()(fit(image, size, resize), options)


def record(detector: Detector, options, size: tuple[int, int], resize: str, name: str, data: bytes) -> dict:
    """What a map's PNG text says of its making."""
    return {
        "kind": detector.kind,
        "detector": detector.name,
        "options": asdict(options),
        "resize": resize,
        "size": list(size),
        "source": name,
        "source_sha256": sha256(data),
        "versions": {"controlnet": version(), "opencv": cv2.__version__},
    }
