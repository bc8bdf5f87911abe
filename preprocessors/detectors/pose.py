"""Pose maps of photos: people are found, and drawn as OpenPose draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from controlnet.preprocessors.detectors.blazepose import BlazePoseOptions, find_people
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.errors import ModelError, NothingFoundError
from controlnet.preprocessors.skeleton import JOINTS, draw, seen, to_text

COCO = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)  # fmt: skip
"""COCO's 17 joints, in its order."""


@dataclass(frozen=True)
class PoseOptions(BlazePoseOptions):
    allow_empty: bool = False
    """Where nobody is found, make a black map instead of an error."""


def blazepose(image: np.ndarray, options: PoseOptions, weights: Path) -> tuple[np.ndarray, dict]:
    """(H, W, 3) uint8 RGB -> the map (H, W, 3) uint8, and its key points for the PNG text. Raises NothingFoundError for
    a photo without people, unless allow_empty."""
    return drawn(find_people(image, options, weights), image, options)


def vitpose(
    image: np.ndarray, options: PoseOptions, weights: Path, finder: Path, on: On = On()
) -> tuple[np.ndarray, dict]:
    """The same by ViTPose (Xu et al. 2022, arXiv 2204.12484), on the people that RT-DETR (Zhao et al. 2023, arXiv
    2304.08069) finds."""
    boxes = _people(image, options, finder, on)
    return drawn(_joints(image, boxes, options, weights, on) if len(boxes) else [], image, options)


def drawn(people: Sequence[np.ndarray], image: np.ndarray, options: PoseOptions) -> tuple[np.ndarray, dict]:
    """The map of the people in a photo, and their key points, without those that lie beyond its borders: the legs of a
    portrait. Raises NothingFoundError if there are none."""
    if not people and not options.allow_empty:
        raise NothingFoundError(
            f"nobody found (surer than {options.confidence:g})",
            "--confidence 0.3, or a photo that shows more of the person; --allow-empty makes a black map",
        )
    keypoints = to_text([seen(person) for person in people])  # rounded: what is drawn is what the text says
    return draw([np.array(person) for person in keypoints], (image.shape[1], image.shape[0])), {"keypoints": keypoints}


def from_coco(points: np.ndarray, size: tuple[int, int], visibility: float) -> np.ndarray:
    """A person (18, 3) of COCO's 17 joints (17, 3), in pixels of a picture of `size` (width, height) with confidences.
    Joints less sure than `visibility` are unknown; the neck is the middle of the shoulders if both are known."""
    person = np.zeros((len(JOINTS), 3))
    for name, (x, y, sure) in zip(COCO, points, strict=True):
        if sure >= visibility:
            person[JOINTS.index(name)] = x / size[0], y / size[1], min(1.0, sure)
    shoulders = person[[JOINTS.index("left shoulder"), JOINTS.index("right shoulder")]]
    if (shoulders[:, 2] > 0).all():
        person[JOINTS.index("neck")] = *shoulders[:, :2].mean(0), shoulders[:, 2].min()
    return person


def _people(image: np.ndarray, options: PoseOptions, finder: Path, on: On) -> np.ndarray:
    """(N, 4) left, top, width and height in pixels of the people in a photo, the surest first."""
    from controlnet.preprocessors.detectors.networks import from_transformers
    from transformers.models.rt_detr.modeling_rt_detr import RTDetrObjectDetectionOutput

    processor, network = from_transformers(finder, "RTDetrForObjectDetection", on, ("logits", "pred_boxes"))
    logits, boxes = network(pixel_values=processor(images=image, return_tensors="pt")["pixel_values"])
    output = RTDetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    sizes = [image.shape[:2]]
    (found,) = processor.post_process_object_detection(output, target_sizes=sizes, threshold=options.confidence)
    names = network.module.config.id2label
    if "person" not in names.values():
        raise ModelError(f"{finder}: a detector that knows no person", "--weights DIR")
    is_person = [names[int(label)] == "person" for label in found["labels"]]
    order = np.argsort(-found["scores"].numpy()[is_person])[: options.people]
    left, top, right, bottom = found["boxes"].numpy()[is_person][order].reshape(-1, 4).T
    return np.column_stack([left, top, right - left, bottom - top])


def _joints(image: np.ndarray, boxes: np.ndarray, options: PoseOptions, weights: Path, on: On) -> list[np.ndarray]:
    from controlnet.preprocessors.detectors.networks import from_transformers
    from transformers.models.vitpose.modeling_vitpose import VitPoseEstimatorOutput

    processor, network = from_transformers(weights, "VitPoseForPoseEstimation", on, ("heatmaps",))
    pixels = processor(images=image, boxes=[boxes], return_tensors="pt")["pixel_values"]
    heatmaps = [network(pixel_values=one[None])[0] for one in pixels]
    import torch

    output = VitPoseEstimatorOutput(heatmaps=torch.cat(heatmaps))
    (found,) = processor.post_process_pose_estimation(output, boxes=[boxes])
    size = (image.shape[1], image.shape[0])
    people = [np.column_stack([one["keypoints"].numpy(), one["scores"].numpy()]) for one in found]
    people = [from_coco(points, size, options.visibility) for points in people]
    return [person for person in people if (person[:, 2] > 0).sum() >= 4]
