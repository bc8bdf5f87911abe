"""Poses with hands and faces by DWPose (Yang et al. 2023, arXiv 2307.15880), as ONNX: YOLOX finds the people, and a
network of 133 points looks at each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors import onnx
from controlnet.preprocessors.detectors.pose import PoseOptions, drawn, from_coco
from controlnet.preprocessors.skeleton import FACE, HAND, whole

FINDER, POSE = "yolox_l.onnx", "dw-ll_ucoco_384.onnx"
FINDER_SIDE, STRIDES, GREY = 640, (8, 16, 32), 114
"""YOLOX: the side of what it sees, its cells' sides, and what surrounds a photo of another aspect."""
SAME = 0.45
"""Two boxes whose intersection over union is above this are one person."""
POSE_SIZE, SPLIT, ROOM = (288, 384), 2, 1.25
"""The pose network: width and height of what it sees, bins a pixel, and how much larger it is than the person."""
MEAN, SPREAD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of its input, RGB."""
BODY, FACE_AT, LEFT_AT, RIGHT_AT, FACE_POINTS = 17, 23, 91, 112, 68
"""Among its 133 points (COCO-WholeBody): how many are the body's, where face and hands begin, points of the face."""


@dataclass(frozen=True)
class DWPoseOptions(PoseOptions):
    hands: bool = False
    """Draw hands, finger by finger."""
    face: bool = False
    """Draw faces, as 68 points."""


def dwpose(image: np.ndarray, options: DWPoseOptions, weights: Path) -> tuple[np.ndarray, dict]:
    """(H, W, 3) uint8 RGB -> the map (H, W, 3) uint8, and its key points for the PNG text. Raises NothingFoundError for
    a photo without people, unless allow_empty."""
    finder = onnx.load(weights / FINDER, ("images",), ("output",), "dwpose")
    network = onnx.load(weights / POSE, ("input",), ("simcc_x", "simcc_y"), "dwpose")
    boxes = find_people(image, finder, options.confidence)[: options.people]
    people = [_person(_points(image, box, network), image.shape[1::-1], options) for box in boxes]
    return drawn([one for one in people if (one[:18, 2] > 0).sum() >= 4], image, options)


def find_people(image: np.ndarray, finder, confidence: float) -> np.ndarray:
    """(N, 4) left, top, right and bottom in pixels of the people in a photo, the surest first."""
    height, width = image.shape[:2]
    ratio = min(FINDER_SIDE / height, FINDER_SIDE / width)
    small = cv2.resize(image, (int(width * ratio), int(height * ratio)), interpolation=cv2.INTER_LINEAR)
    seen = np.full((FINDER_SIDE, FINDER_SIDE, 3), GREY, np.float32)
    seen[: small.shape[0], : small.shape[1]] = small[..., ::-1]  # BGR
    (found,) = onnx.run(finder, ("output",), images=np.ascontiguousarray(seen.transpose(2, 0, 1)[None]))
    cells, strides = _cells()
    middles, sizes = (found[0, :, :2] + cells) * strides, np.exp(found[0, :, 2:4]) * strides
    boxes = np.column_stack([middles - sizes / 2, sizes])
    scores = found[0, :, 4] * found[0, :, 5]  # something, and a person
    kept = cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), confidence, SAME)
    left, top, w, h = (boxes[np.array(kept, int).ravel()] / ratio).reshape(-1, 4).T
    return np.column_stack([left, top, left + w, top + h])


def _cells() -> tuple[np.ndarray, np.ndarray]:
    """The cells of YOLOX's three grids in the order of its output: (8400, 2) columns and rows, (8400, 1) strides."""
    places, strides = [], []
    for stride in STRIDES:
        rows, columns = np.mgrid[0 : FINDER_SIDE // stride, 0 : FINDER_SIDE // stride]
        places.append(np.stack([columns, rows], -1).reshape(-1, 2))
        strides.append(np.full((places[-1].shape[0], 1), stride))
    return np.concatenate(places), np.concatenate(strides)


def _points(image: np.ndarray, box: np.ndarray, network) -> np.ndarray:
    """The 133 points of a person in a box: (133, 3) x, y in pixels and a confidence."""
    middle, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * ROOM
    aspect = POSE_SIZE[0] / POSE_SIZE[1]
    size = np.array([max(size[0], size[1] * aspect), max(size[1], size[0] / aspect)])
    scale = POSE_SIZE[0] / size[0]
    matrix = np.array(
        [[scale, 0, POSE_SIZE[0] / 2 - scale * middle[0]], [0, scale, POSE_SIZE[1] / 2 - scale * middle[1]]]
    )
    seen = cv2.warpAffine(image, matrix, POSE_SIZE, flags=cv2.INTER_LINEAR)
    pixels = ((seen - np.array(MEAN)) / SPREAD).transpose(2, 0, 1)[None].astype(np.float32)
    across, down = (one[0] for one in onnx.run(network, ("simcc_x", "simcc_y"), input=pixels))
    found = np.column_stack([across.argmax(1), down.argmax(1)]) / SPLIT
    sure = np.minimum(across.max(1), down.max(1))
    return np.column_stack([(found - np.array(POSE_SIZE) / 2) / scale + middle, sure])


def _person(points: np.ndarray, size: tuple[int, ...], options: DWPoseOptions) -> np.ndarray:
    """A person (18, 3), or with hands or a face (130, 3)."""
    width, height = size
    person = from_coco(points[:BODY], (width, height), options.visibility)
    if not options.hands and not options.face:
        return person
    known = points / (width, height, 1)
    known[points[:, 2] < options.visibility] = 0
    face = np.zeros((FACE, 3))
    face[:FACE_POINTS] = known[FACE_AT : FACE_AT + FACE_POINTS]
    left, right = (known[at : at + HAND] if options.hands else None for at in (LEFT_AT, RIGHT_AT))
    return whole(person, left, right, face if options.face else None)
