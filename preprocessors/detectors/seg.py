"""What is where in a photo, in ADE20K's colours, by networks of transformers that know its 150 classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.palette import coloured, colours


@dataclass(frozen=True)
class SegOptions:
    pass


def upernet(image: np.ndarray, options: SegOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W, 3) uint8, by UperNet (Xiao et al. 2018, arXiv 1807.10221)."""
    return _coloured(image, weights, on, "UperNetForSemanticSegmentation", ("logits",))


def mask2former(image: np.ndarray, options: SegOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W, 3) uint8, by Mask2Former (Cheng et al. 2022, arXiv 2112.01527)."""
    outputs = ("class_queries_logits", "masks_queries_logits")
    return _coloured(image, weights, on, "Mask2FormerForUniversalSegmentation", outputs)


def _coloured(image: np.ndarray, weights: Path, on: On, model: str, outputs: tuple[str, ...]) -> np.ndarray:
    from controlnet.preprocessors.detectors.networks import from_transformers

    processor, network = from_transformers(weights, model, on, outputs)
    if (count := network.module.config.num_labels) != len(colours()):
        raise ModelError(
            f"{weights}: a network of {count} classes, expected ADE20K's {len(colours())}", "--weights DIR"
        )
    found = network(pixel_values=processor(images=image, return_tensors="pt")["pixel_values"])
    named = SimpleNamespace(**dict(zip(outputs, found, strict=True)))
    (classes,) = processor.post_process_semantic_segmentation(named, target_sizes=[image.shape[:2]])
    return coloured(classes.numpy())
