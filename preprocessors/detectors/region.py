"""The thing at a point of a photo, by SAM 2 (Ravi et al. 2024, arXiv 2408.00714): a mask to paint in (`--mask`), or to
control in (`region=`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.errors import NothingFoundError, UsageError

MODEL, OUTPUTS = "Sam2Model", ("pred_masks", "iou_scores")


@dataclass(frozen=True)
class RegionOptions:
    at: str = "0.5,0.5"
    """Points on the thing: x,y as fractions of the map, several between slashes."""
    without: str = ""
    """Points that are not on it."""
    box: str = ""
    """A box around it, left,top,right,bottom, in place of points."""
    invert: bool = False
    """White where the thing is not."""

    def __post_init__(self):
        if not self.box and not self.at:
            raise UsageError("no point and no box", "controlnet detect region PHOTO --at 0.5,0.5")
        for text in (self.at, self.without):
            points(text)
        if self.box:
            _numbers(self.box, 4)


def sam2(image: np.ndarray, options: RegionOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, 0 or 255. Raises NothingFoundError where there is no thing."""
    from controlnet.preprocessors.detectors.networks import from_transformers

    processor, network = from_transformers(weights, MODEL, on, OUTPUTS)
    asked = processor(images=image, return_tensors="pt", **_question(options, image.shape[1], image.shape[0]))
    sizes = asked.pop("original_sizes")
    masks, scores = network(**asked)
    best = int(scores[0, 0].argmax())
    mask = processor.post_process_masks([masks[0]], sizes)[0][0, best].numpy() > 0
    if not mask.any():
        raise NothingFoundError("there is no thing at this point", "--at with another point, or --box around it")
    return np.where(mask ^ options.invert, 255, 0).astype(np.uint8)


def _question(options: RegionOptions, width: int, height: int) -> dict:
    """What SAM 2's processor wants to know, in pixels."""
    if options.box:
        left, top, right, bottom = _numbers(options.box, 4)
        return {"input_boxes": [[[left * width, top * height, right * width, bottom * height]]]}
    on, off = points(options.at), points(options.without)
    pixels = [[x * width, y * height] for x, y in on + off]
    return {"input_points": [[pixels]], "input_labels": [[[1] * len(on) + [0] * len(off)]]}


def points(text: str) -> list[tuple[float, float]]:
    """`x,y` or `x,y/x,y/...`, fractions. Raises UsageError."""
    return [(x, y) for x, y in (_numbers(part, 2) for part in text.split("/") if part)]


def _numbers(text: str, count: int) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(math.isfinite(v) and 0 <= v <= 1 for v in found):
        raise UsageError(f"{text!r}: expected {count} numbers from 0 to 1, between commas", "--at 0.5,0.5")
    return found
