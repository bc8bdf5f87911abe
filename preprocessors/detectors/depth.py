"""Depth maps (near is white, far is black), and normal maps made from them.

A network gives numbers that grow towards the viewer: the inverse of the distance, up to a factor (and for most networks
a constant) that cannot be known from a picture. `depth_and_normal` makes both detectors from a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.jsons import object_or_empty

Nearness = Callable[[np.ndarray, Path, On], np.ndarray]
"""(picture (H, W, 3) uint8 RGB, folder of weights, where it runs) -> (H, W) float that grows towards the viewer."""
METRIC = ("zoedepth", "depth_pro")
"""Types of transformers' networks that predict metres."""
HALF = ("depth_anything", "dpt", "depth_pro")
"""Those that work in half precision but for their head: maps show the steps of its numbers."""


@dataclass(frozen=True)
class DepthOptions:
    raw: bool = False
    """Write 16 bits per pixel instead of 8."""


@dataclass(frozen=True)
class NormalOptions:
    strength: float = 1.0
    """Steepness: at 1, a rise from the farthest to the nearest point over the length of the shorter side is 45
    degrees."""

    def __post_init__(self):
        if not 0 <= self.strength <= 100:
            raise UsageError(
                f"strength={self.strength}: expected 0 to 100",
                "controlnet detect normal PHOTO --strength 1",
            )


def to_map(nearness: np.ndarray, options: DepthOptions) -> tuple[np.ndarray, dict]:
    """(H, W) numbers that grow towards the viewer -> the map (H, W), uint8 or uint16, with the least number black and
    the greatest white; and these two, for the PNG text. If all numbers are equal, the map is black."""
    check_finite(nearness)
    low, high = float(nearness.min()), float(nearness.max())
    top = 65535 if options.raw else 255
    scaled = (nearness - low) / (high - low) if high > low else np.zeros(nearness.shape)
    map_ = np.rint(scaled * top).astype(np.uint16 if options.raw else np.uint8)
    return map_, {"normalisation": {"black": low, "white": high}}


def to_normals(nearness: np.ndarray, options: NormalOptions) -> np.ndarray:
    """(H, W) numbers that grow towards the viewer -> normals (H, W, 3) uint8, (n + 1) / 2 as RGB: red faces left, green
    up, blue the viewer, as in ScanNet's normal maps and ControlNet 1.1's normalbae.

    The numbers are taken as a relief whose height goes from 0 to 1 and whose shorter side is 1 long. Slopes are
    therefore relative, and a step between near and far shows as a steep rim.
    """
    check_finite(nearness)
    span = np.ptp(nearness) or 1.0
    relief = (nearness.astype(np.float32) - nearness.min()) / span * (options.strength * min(nearness.shape))
    padded = np.pad(relief, 1, mode="edge")  # flat outside, so slopes at the border are halved
    right, down = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    normals = np.stack([right, down, np.ones_like(right)], 2)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    return np.rint((normals + 1) * 127.5).astype(np.uint8)


def check_finite(nearness: np.ndarray) -> None:
    """Raises ModelError for NaN and infinity, which only damaged weights give."""
    if not np.isfinite(nearness).all():
        raise ModelError("the depth network gives NaN or infinite numbers: its weights are damaged", "--weights DIR")


def depth_and_normal(near: Nearness, numbers: int | None = None) -> tuple[Callable, Callable]:
    """The depth detector and the normal detector of a network. `numbers` is how many numbers a coarse network gives
    along the shorter side: the normals are smoothed at that scale, because slopes show the coarse grid, while depth
    does not."""

    def depth(image: np.ndarray, options: DepthOptions, weights: Path, on: On = On()) -> tuple[np.ndarray, dict]:
        return to_map(near(image, weights, on), options)

    def normal(image: np.ndarray, options: NormalOptions, weights: Path, on: On = On()) -> np.ndarray:
        relief = near(image, weights, on)
        if numbers is not None:
            relief = cv2.GaussianBlur(
                relief, (0, 0), 1.5 * min(relief.shape) / numbers, borderType=cv2.BORDER_REPLICATE
            )
        return to_normals(relief, options)

    return depth, normal


def _tiny(image: np.ndarray, weights: Path, on: On) -> np.ndarray:
    from controlnet.preprocessors.detectors import tiny_depth  # here: it imports torch

    return tiny_depth.nearness(tiny_depth.load(weights, on), image)


def _transformer(image: np.ndarray, weights: Path, on: On) -> np.ndarray:
    """Nearness by one of transformers' depth-estimation networks. Those that predict inverse distance (Depth Anything
    V2, Yang et al. 2024, arXiv 2406.09414; DPT, Ranftl et al. 2021, arXiv 2103.13413) are used as they are; ZoeDepth
    (Bhat et al. 2023, arXiv 2302.12288) and Depth Pro (Bochkovskii et al. 2024, arXiv 2410.02073) predict metres, which
    are inverted."""
    from controlnet.preprocessors.detectors.networks import from_transformers
    from transformers.modeling_outputs import DepthEstimatorOutput

    kind = _model_type(weights)
    outputs = ("predicted_depth", "field_of_view") if kind == "depth_pro" else ("predicted_depth",)
    half = kind in HALF
    processor, network = from_transformers(
        weights, "AutoModelForDepthEstimation", on, outputs, half, ("head",) if half else ()
    )
    found = network(pixel_values=processor(images=image, return_tensors="pt")["pixel_values"])
    size = [image.shape[:2]]
    sizes = {"target_sizes": size} | ({"source_sizes": size} if kind == "zoedepth" else {})
    output = DepthEstimatorOutput(predicted_depth=found[0])
    output.field_of_view = found[1] if len(found) > 1 else None
    predicted = processor.post_process_depth_estimation(output, **sizes)[0]["predicted_depth"].numpy()
    return 1 / predicted.clip(1e-3) if kind in METRIC else predicted


def _model_type(weights: Path) -> str:
    """What a folder of transformers says its network is; "" if it says nothing."""
    try:
        return str(object_or_empty((weights / "config.json").read_bytes()).get("model_type", ""))
    except OSError:
        return ""


def _midas(image: np.ndarray, weights: Path, on: On) -> np.ndarray:
    """Nearness by MiDaS 3.0, DPT-Hybrid (Ranftl et al. 2021, arXiv 2103.13413), whose maps ControlNet's depth networks
    were trained on. controlnet-aux runs it; its input has a shorter side of 384 pixels, sides that are multiples of 32,
    and colours from -1 to 1."""
    import torch

    network = _midas_network(weights, on)
    height, width = image.shape[:2]
    times = 384 / min(height, width)
    small = cv2.resize(image, [max(32, round(side * times / 32) * 32) for side in (width, height)])
    predicted = network(x=torch.from_numpy(small).permute(2, 0, 1)[None].float() / 127.5 - 1)[0][0].numpy()
    return cv2.resize(predicted, (width, height), interpolation=cv2.INTER_CUBIC)


@cache
def _midas_network(weights: Path, on: On):
    from controlnet.preprocessors.detectors.controlnet_aux import load_detector
    from controlnet.preprocessors.detectors.networks import Network

    return Network(load_detector("MidasDetector", weights, on).model, on, True, exact=("model.scratch.output_conv",))


tiny_depth, tiny_normal = depth_and_normal(_tiny, 80)
transformer_depth, transformer_normal = depth_and_normal(_transformer)
midas_depth, midas_normal = depth_and_normal(_midas)
