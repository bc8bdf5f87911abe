"""Detectors from controlnet-aux, for rows of the registry: its networks, its weights, its results.

Of controlnet-aux only the module that is needed is imported, not the package itself, which imports all it has: that
takes seconds, and fails where one of a dozen libraries is too new for it.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.detectors.hed import SoftEdgeOptions
from controlnet.preprocessors.devices import choose_device
from controlnet.preprocessors.errors import InputError, ModelError, NothingFoundError, reason
from controlnet.preprocessors.skeleton import FACE, HAND, JOINTS, draw, to_text, whole

MOST = 12_000_000
"""The most pixels of a picture for networks that process it as a whole."""
MODULES = {
    "OpenposeDetector": "open_pose", "PidiNetDetector": "pidi", "MidasDetector": "midas",
    "NormalBaeDetector": "normalbae", "LineartDetector": "lineart", "LineartAnimeDetector": "lineart_anime",
}  # fmt: skip
"""Class -> its module in controlnet-aux."""
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class PlainOptions:
    pass


@dataclass(frozen=True)
class LineArtOptions:
    coarse: bool = False
    """Few, thick lines."""


@dataclass(frozen=True)
class OpenposeOptions:
    allow_empty: bool = False
    """Where nobody is found, make a black map instead of an error."""
    hands: bool = False
    """Draw hands, finger by finger."""
    face: bool = False
    """Draw faces, as 70 points."""


def openpose(image: np.ndarray, options: OpenposeOptions, weights: Path, on: On = On()) -> tuple[np.ndarray, dict]:
    """People by OpenPose's own network: the map (H, W, 3) uint8 and its key points. Raises NothingFoundError for a
    photo without people, unless allow_empty."""
    with _running("OpenposeDetector", weights, on) as detector:
        found = detector.detect_poses(image, include_hand=options.hands, include_face=options.face)
    people = []
    for pose in found:
        person = _points(pose.body.keypoints, len(JOINTS))
        if options.hands or options.face:
            left, right, face = (
                None if part is None else _points(part, count)
                for part, count in ((pose.left_hand, HAND), (pose.right_hand, HAND), (pose.face, FACE))
            )
            person = whole(person, left, right, face)
        people.append(person)
    if not people and not options.allow_empty:
        raise NothingFoundError("nobody found", "--detector blazepose, or --allow-empty for a black map")
    keypoints = to_text(people)
    return draw([np.array(person) for person in keypoints], (image.shape[1], image.shape[0])), {"keypoints": keypoints}


def pidinet(image: np.ndarray, options: SoftEdgeOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8: soft edges by PiDiNet."""
    height, width = image.shape[:2]
    side = min(height, width)
    if side < 64:
        raise InputError(
            f"{width}x{height} is too small for PiDiNet, expected at least 64 pixels per side", "--size 512"
        )
    _check_size(image, "PiDiNet", "--detector hed, which works in tiles")
    with _running("PidiNetDetector", weights, on) as detector:
        made = detector(image, detect_resolution=side, image_resolution=side, output_type="np", safe=options.safe)
    # PiDiNet works at multiples of 64 pixels.
    return cv2.resize(np.ascontiguousarray(made[..., 0]), (width, height), interpolation=cv2.INTER_LINEAR)


def lineart(image: np.ndarray, options: LineArtOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8: line drawings by Chan et al. 2022 (arXiv 2203.12691), white on black."""
    _check_size(image, "this network", "--detector standard")
    network = _network("LineartDetector", weights, on, "model_coarse" if options.coarse else "model")
    drawn = _in_steps(image, 8, lambda pixels: _look(network, pixels / 255)[0])
    return 255 - (drawn * 255).clip(0, 255).astype(np.uint8)


def lineart_anime(image: np.ndarray, options: PlainOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8: lines of drawn pictures by the network of Anime2Sketch (Xiang et al. 2022),
    white on black. It sees multiples of 256 pixels."""
    _check_size(image, "this network", "--detector standard")
    network = _network("LineartAnimeDetector", weights, on)
    drawn = _in_steps(image, 256, lambda pixels: _look(network, pixels / 127.5 - 1)[0])
    return 255 - (drawn * 127.5 + 127.5).clip(0, 255).astype(np.uint8)


def normalbae(image: np.ndarray, options: PlainOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> normals (H, W, 3) uint8, by Bae et al. 2021 (arXiv 2109.09881): red faces left, green up,
    blue the viewer."""
    _check_size(image, "NormalBae", "--detector tiny-depth")
    network = _network("NormalBaeDetector", weights, on)
    found = _in_steps(image, 64, lambda pixels: _look(network, (pixels / 255 - _MEAN) / _SPREAD).transpose(1, 2, 0))
    return ((found + 1) * 127.5).clip(0, 255).astype(np.uint8)


_MEAN, _SPREAD = (np.array(one, np.float32) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
"""Of the pixels that NormalBae sees, RGB from 0 to 1."""


@cache
def _network(name: str, weights: Path, on: On, part: str = "model") -> Any:
    """The network of a detector, in half precision where the processor has it."""
    import torch
    from controlnet.preprocessors.detectors.networks import Network

    module = getattr(load_detector(name, weights, on), part)

    def forward(x):
        made = module(x)
        # NormalBae gives lists of sizes, the last one the finest, of a normal and how sure it is.
        return made[0][-1][:, :3] if isinstance(made, (list, tuple)) else made

    return Network(module.to(memory_format=torch.channels_last), on, half=True, forward=forward)


def _look(network: Any, pixels: np.ndarray) -> np.ndarray:
    """What a network makes of pixels (H, W, 3): (C, H, W) float32."""
    import torch

    x = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
    return network(x=x.contiguous(memory_format=torch.channels_last))[0][0].numpy()


def _in_steps(image: np.ndarray, step: int, look) -> np.ndarray:
    """What `look` gives for the picture at sides that are multiples of `step`, brought back to its size."""
    height, width = image.shape[:2]
    sides = [-(-side // step) * step for side in (width, height)]
    seen = image if sides == [width, height] else cv2.resize(image, sides, interpolation=cv2.INTER_CUBIC)
    found = look(seen.astype(np.float32))
    return found if sides == [width, height] else cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR)


def _points(keypoints, count: int) -> np.ndarray:
    """(count, 3) of controlnet-aux's key points: fractions, and below 0 or None where unknown."""
    points = [(k.x, k.y, 1.0) if k is not None and k.x >= 0 and k.y >= 0 else (0.0, 0.0, 0.0) for k in keypoints]
    points += [(0.0, 0.0, 0.0)] * (count - len(points))
    return np.array(points[:count])


def _check_size(image: np.ndarray, name: str, other: str) -> None:
    height, width = image.shape[:2]
    if width * height > MOST:
        fits = int((MOST / (width * height)) ** 0.5 * min(height, width)) // 8 * 8
        raise InputError(
            f"{width}x{height}: {name} needs some 600 bytes per pixel; at most {MOST // 10**6} million of them",
            f"--size {fits}, or {other}",
        )


@contextmanager
def _running(name: str, weights: Path, on: On) -> Iterator:
    """A detector for one photo at a time."""
    with _ONE_AT_A_TIME:
        yield load_detector(name, weights, on)


@cache
def load_detector(name: str, weights: Path, on: On = On()):
    """A detector of controlnet-aux, by the name of its class. Raises ModelError for weights that it cannot read."""
    try:
        return detector_class(name).from_pretrained(str(weights)).to(choose_device(on.device))
    except Exception as error:  # whatever torch and the networks raise for a wrong file
        raise ModelError(
            f"{weights}: are not the weights of {name} ({reason(error)[:200]})", "--weights DIR"
        ) from error


def detector_class(name: str) -> Any:
    """A class of controlnet-aux, without the package's own `__init__`."""
    with warnings.catch_warnings(), _bare("controlnet_aux"):
        warnings.simplefilter("ignore")  # from the libraries that it imports, about each other
        return getattr(importlib.import_module(f"controlnet_aux.{MODULES[name]}"), name)


@contextmanager
def _bare(name: str) -> Iterator[None]:
    """While this lasts, a package is a place for its modules alone."""
    if name in sys.modules:
        yield
        return
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    try:
        yield
    finally:
        del sys.modules[name]
