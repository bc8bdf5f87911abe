"""Poses by BlazePose (Bazarevsky et al. 2020, arXiv 2006.10204): two small networks, run by LiteRT.

The detector, at 224 pixels, finds a person's hip centre, size and rotation. The landmark network sees that part of the
photo, turned upright, at 256 pixels and gives 33 points, from which OpenPose's 18 joints follow. The detector is made
for one person who fills the picture; so that smaller and several people are found too, it is also shown squares of the
photo.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors import litert
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.skeleton import JOINTS

DETECTION, LANDMARKS = "pose_detection.tflite", "pose_landmark_full.tflite"
DETECTOR_SIDE, LANDMARK_SIDE = 224, 256
SHAPES = {
    DETECTION: ((1, 224, 224, 3), (1, 2254, 12), (1, 2254, 1)),
    LANDMARKS: ((1, 256, 256, 3), (1, 195), (1, 1)),
}
"""The shapes of each network's input and of its first two outputs."""
ANCHORS = ((8, 2), (16, 2), (32, 6))
"""(stride, anchors per cell) of the detector's outputs."""
REGION = 1.25
"""The side of the square that the landmark network sees, over the diameter of the detector's circle around a person."""
PASSES = 2
"""Runs of the landmark network; each after the first takes its part of the photo from the points of the one before."""
OVERLAP = 0.3
"""Two detections whose intersection over union is above this count as one."""
LANDMARK = {
    "nose": 0, "left eye": 2, "right eye": 5, "left ear": 7, "right ear": 8, "left shoulder": 11, "right shoulder": 12,
    "left elbow": 13, "right elbow": 14, "left wrist": 15, "right wrist": 16, "left hip": 23, "right hip": 24,
    "left knee": 25, "right knee": 26, "left ankle": 27, "right ankle": 28,
}  # fmt: skip
"""BlazePose's number for each joint; the neck is the middle of the shoulders."""
MIRRORED = [0, 4, 5, 6, 1, 2, 3, *(i + 1 if i % 2 else i - 1 for i in range(7, 33)), *range(33, 39)]
"""Landmark i of a person is landmark MIRRORED[i] of its mirror image."""
DISAGREEMENT = 0.1
"""The largest mean distance allowed between the joints found in a picture and in its mirror image, as a fraction of
their extent: where nobody is, the network sees someone else in the mirror image. With this limit 20 % of photos without
people (89 of Flickr8k) pass as showing someone, without it 56 %."""


@dataclass(frozen=True)
class BlazePoseOptions:
    people: int = 5
    """The most people to draw, surest first."""
    confidence: float = 0.55
    """How sure it must be of a person (0 to 1)."""
    visibility: float = 0.3
    """How visible a joint must be to be drawn (0 to 1)."""

    def __post_init__(self):
        if self.people < 1:
            raise UsageError(f"people={self.people}: expected 1 or more", "controlnet detect pose PHOTO --people 5")
        for name in ("confidence", "visibility"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    f"{name}={getattr(self, name)}: expected 0 to 1", f"controlnet detect pose PHOTO --{name} 0.5"
                )


def find_people(image: np.ndarray, options: BlazePoseOptions, weights: Path) -> list[np.ndarray]:
    """The people (18, 3) of a photo (H, W, 3) uint8 RGB, as in preprocessors.skeleton; the surest first."""
    detect, landmarks = (litert.load(weights / name, SHAPES[name], "blazepose") for name in (DETECTION, LANDMARKS))
    found: list[np.ndarray] = []
    for circle in _circles(image, detect, options.confidence):
        points, sure = np.empty(0), 0.0
        for look in range(PASSES):
            points, sure = _landmarks(image, landmarks, circle, twice=look == PASSES - 1)
            if sure < options.confidence:
                break
            circle = points[33, :2], points[34, :2]
        if sure < options.confidence:
            continue
        person = _joints(points, image.shape[1::-1], options.visibility)
        if (person[:, 2] > 0).sum() >= 4 and not any(_same(person, other, image.shape) for other in found):
            found.append(person)
        if len(found) == options.people:
            break
    return found


def _joints(points: np.ndarray, size: tuple[int, int], visibility: float) -> np.ndarray:
    """A person (18, 3), fractions of the picture and confidences, from landmarks (39, 4): x, y in pixels, visibility,
    presence."""
    person = np.zeros((len(JOINTS), 3))
    for name, number in LANDMARK.items():
        x, y, visible, present = points[number]
        if min(visible, present) >= visibility:
            person[JOINTS.index(name)] = x / size[0], y / size[1], min(visible, present)
    shoulders = person[[JOINTS.index("left shoulder"), JOINTS.index("right shoulder")]]
    if (shoulders[:, 2] > 0).all():
        person[JOINTS.index("neck")] = *shoulders[:, :2].mean(0), shoulders[:, 2].min()
    return person


def _same(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether two are the same person: the median distance between their joints is under a tenth of their size."""
    both = (a[:, 2] > 0) & (b[:, 2] > 0)
    if both.sum() < 3:
        return False
    at, to = (p[both, :2] * (shape[1], shape[0]) for p in (a, b))
    size = max(np.ptp(at, axis=0).max(), np.ptp(to, axis=0).max(), 1.0)
    return bool(np.median(np.linalg.norm(at - to, axis=1)) < 0.1 * size)


def _circles(image: np.ndarray, network, confidence: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """(hip centre, point above the head's top) in pixels, for everyone that the detector finds in the photo and in
    squares of it."""
    boxes, points, scores = [], [], []
    for left, top, side in _squares(image.shape[1], image.shape[0]):
        canvas = _cut(image, left, top, side, DETECTOR_SIDE)
        raw, logits = litert.run(network, canvas / 127.5 - 1, 2)
        score = 1 / (1 + np.exp(-np.clip(logits[:, 0], -80, 80)))
        sure = score >= confidence
        pairs = raw[sure].reshape(-1, 6, 2) / DETECTOR_SIDE
        pairs[:, [0, 2, 3, 4, 5]] += _anchors()[sure][:, None]
        pairs *= side
        pairs[:, [0, 2, 3, 4, 5]] += (left, top)
        boxes += list(np.concatenate([pairs[:, 0] - pairs[:, 1] / 2, pairs[:, 1]], 1))
        points += list(pairs[:, 2:4])
        scores += score[sure].tolist()
    kept = cv2.dnn.NMSBoxes(np.array(boxes).tolist(), scores, confidence, OVERLAP) if boxes else []
    return [(points[i][0], points[i][1]) for i in np.array(kept).reshape(-1)]


def _squares(width: int, height: int) -> list[tuple[float, float, float]]:
    """(left, top, side) of squares to search: one around the whole photo, then overlapping ones that cover it, first as
    large as the shorter side, then six tenths of that."""
    longer, shorter = max(width, height), min(width, height)
    squares = [((width - longer) / 2, (height - longer) / 2, float(longer))]
    for side in (float(shorter), 0.6 * shorter):
        if side == longer:
            continue
        lefts, tops = (np.linspace(0, n - side, 1 + int(np.ceil((n - side) / (side / 2)))) for n in (width, height))
        squares += [(float(left), float(top), side) for top in tops for left in lefts]
    return squares


def _cut(image: np.ndarray, left: float, top: float, side: float, size: int) -> np.ndarray:
    """A square of the photo at `size` pixels, black beyond the photo: (size, size, 3) float32 in 0 to 255."""
    scale = size / side
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    return _warp(image, matrix, size, scale)


def _warp(image: np.ndarray, matrix: np.ndarray, size: int, scale: float) -> np.ndarray:
    if scale < 0.5:  # linear sampling would skip pixels
        times = int(1 / scale)
        smaller = [max(1, side // times) for side in image.shape[1::-1]]
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
        matrix = matrix * (times, times, 1)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR).astype(np.float32)


def _landmarks(
    image: np.ndarray, network, circle: tuple[np.ndarray, np.ndarray], twice: bool = False
) -> tuple[np.ndarray, float]:
    """((39, 4) x, y in pixels, visibility, presence; the confidence that it is a person). With `twice`, the points are
    averaged with those from the mirrored picture, and the confidence is the lower one, or 0 if the two disagree."""
    centre, above = circle
    up = above - centre
    side = max(2.0, 2 * float(np.hypot(*up)) * REGION)
    cos, sin = np.array([-up[1], up[0]]) / max(np.hypot(*up), 1e-6)  # turned so that `up` points up
    scale = LANDMARK_SIDE / side
    turn = scale * np.array([[cos, sin], [-sin, cos]])
    matrix = np.column_stack([turn, LANDMARK_SIDE / 2 - turn @ centre])
    pixels = _warp(image, matrix, LANDMARK_SIDE, scale) / 255
    points, sure = _look(network, pixels)
    if twice:
        mirrored, also = _look(network, pixels[:, ::-1])
        mirrored[:, 0] = LANDMARK_SIDE - 1 - mirrored[:, 0]
        sure = min(sure, also) if _disagreement(points, mirrored[MIRRORED]) <= DISAGREEMENT else 0.0
        points = (points + mirrored[MIRRORED]) / 2
    points[:, :2] = (points[:, :2] - LANDMARK_SIDE / 2) @ np.linalg.inv(turn).T + centre
    return points, sure


def _look(network, pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """((39, 4) x, y in these pixels, visibility, presence; the confidence that it is a person)."""
    out, sure = litert.run(network, pixels, 2)
    points = out.reshape(39, 5).astype(np.float64)
    seen = 1 / (1 + np.exp(-np.clip(points[:, 3:5], -80, 80)))
    return np.column_stack([points[:, :2], seen]), float(sure.reshape(-1)[0])


def _disagreement(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance between the joints of two results, weighted by visibility, as a fraction of their extent."""
    joints = list(LANDMARK.values())
    a, b = a[joints], b[joints]
    visible = a[:, 2:].min(1)
    extent = max(1.0, float(np.ptp(a[:, :2], axis=0).max()))
    return float(np.average(np.linalg.norm(a[:, :2] - b[:, :2], axis=1), weights=visible + 1e-9)) / extent


@cache
def _anchors() -> np.ndarray:
    """(2254, 2) centres of the detector's anchors, as fractions."""
    centres = []
    for stride, count in ANCHORS:
        cells = DETECTOR_SIDE // stride
        y, x = np.mgrid[0:cells, 0:cells]
        grid = (np.stack([x, y], -1).reshape(-1, 2) + 0.5) / cells
        centres.append(np.repeat(grid, count, 0))
    return np.concatenate(centres)
