"""Depth maps: near is white, far is black."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.errors import ModelError


@dataclass(frozen=True)
class DepthOptions:
    raw: bool = False
    """16 bits instead of 8."""


def to_map(nearness: np.ndarray, options: DepthOptions) -> tuple[np.ndarray, dict]:
    """(H, W) numbers that grow towards the viewer -> the map (H, W), uint8 or uint16, from its least to its greatest
    number; and these two, for the PNG text. One flat distance is black."""
    low, high = float(nearness.min()), float(nearness.max())
    top = 65535 if options.raw else 255
    scaled = (nearness - low) / (high - low) if high > low else np.zeros(nearness.shape)
    map_ = np.rint(scaled * top).astype(np.uint16 if options.raw else np.uint8)
    return map_, {"normalisation": {"black": low, "white": high}}


def depth_anything(image: np.ndarray, options: DepthOptions, weights: Path) -> tuple[np.ndarray, dict]:
    """(H, W, 3) uint8 RGB -> the map by a network of transformers' depth-estimation classes, such as Depth Anything V2
    (Yang et al. 2024, arXiv 2406.09414), which predicts inverse distance."""
    import torch

    processor, network = _transformer(weights)
    with torch.inference_mode():
        predicted = network(**processor(images=image, return_tensors="pt")).predicted_depth[0].float().numpy()
    return to_map(cv2.resize(predicted, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), options)


@cache
def _transformer(weights: Path):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        processor = AutoImageProcessor.from_pretrained(weights, local_files_only=True)
        return processor, AutoModelForDepthEstimation.from_pretrained(weights, local_files_only=True).eval()
    except Exception as error:  # transformers raises a dozen types for a folder of something else
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{weights}: holds no depth network ({reason})", "--weights DIR") from error
