"""A pose as key points and as a picture: OpenPose's 18 joints and 17 limbs, in its order and colours.

A person is an array (18, 3): x and y as fractions of the picture's width and height, and a confidence, 0 for an unknown
joint. With hands and face it is (130, 3): 18 joints, 21 points of the left hand, 21 of the right one, 70 of the face.
Positions may lie outside the picture. A pose map carries its key points in its PNG text; to resize, cut or mirror it,
it is drawn again.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from controlnet.preprocessors.errors import InputError

JOINTS = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "right eye", "left eye",
    "right ear", "left ear",
)  # fmt: skip
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
BODY = LIMBS[:12]
"""The limbs without those of the face."""
ARMS_AND_LEGS = tuple(limb for limb in BODY if 1 not in limb)
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""RGB of joint i and, times 0.6, of limb i."""
HAND, FACE = 21, 70
LEFT_HAND, RIGHT_HAND, WHOLE = len(JOINTS), len(JOINTS) + HAND, len(JOINTS) + 2 * HAND + FACE
"""Where the points of the hands begin, and how many points a person with hands and face has."""
FINGERS = tuple((0 if i % 4 == 0 else i, i + 1) for i in range(HAND - 1))
"""The 20 bones of a hand: from the wrist along each finger."""
FINGER_COLOURS = tuple(
    tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / len(FINGERS), 1, 1)) for i in range(len(FINGERS))
)
"""RGB of bone i."""
_JAW_TO_NOSE = [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)]
_EYES_TO_PUPILS = [
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40, *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1),
    *range(67, 64, -1), 69, 68,
]  # fmt: skip
MIRRORED_FACE = [*_JAW_TO_NOSE, *_EYES_TO_PUPILS]
"""Point i of a face (the 68 of iBUG 300-W and the pupils) is point MIRRORED_FACE[i] of its mirror image."""
MIRRORED = [JOINTS.index(j.replace("left", "R").replace("right", "left").replace("R", "right")) for j in JOINTS]
"""Joint i of a person is joint MIRRORED[i] of its mirror image."""
FAR = 100
"""The farthest that a joint may lie outside the picture, in picture sizes."""
WIDTH, PER = 4, 512
"""Half the width of a limb and the radius of a joint are WIDTH pixels if the picture's shorter side is PER."""


def draw(people: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The pose map (H, W, 3) uint8 of people (18, 3) or (130, 3), `size` being (width, height).

    With a shorter side of 512 pixels it is what controlnet-aux's draw_poses draws. Lines grow with the picture;
    below 512 it is drawn larger and shrunk by area averaging, since lines of one pixel would be lost.
    """
    width, height = size
    times = max(1, -(-PER // min(size)))
    canvas = np.zeros((height * times, width * times, 3), np.uint8)
    thick = max(1, round(WIDTH * min(canvas.shape[:2]) / PER))
    for person in people:
        known = person[:, 2] > 0
        at = person[:, :2] * (canvas.shape[1], canvas.shape[0])
        for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
            if known[a] and known[b]:
                (x, y), (dx, dy) = at[[a, b]].mean(0), at[a] - at[b]
                axes, angle = (int(np.hypot(dx, dy) / 2), thick), int(np.degrees(np.arctan2(dy, dx)))
                polygon = cv2.ellipse2Poly((int(x), int(y)), axes, angle, 0, 360, 1)
                cv2.fillConvexPoly(canvas, polygon, [int(c * 0.6) for c in colour])
        for joint in np.flatnonzero(known[: len(JOINTS)]):
            cv2.circle(canvas, (int(at[joint, 0]), int(at[joint, 1])), thick, COLOURS[joint], -1)
        if len(person) == WHOLE:
            _draw_hands_and_face(canvas, at.astype(int), known, thick)
    return canvas if times == 1 else cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)


def _draw_hands_and_face(canvas: np.ndarray, at: np.ndarray, known: np.ndarray, thick: int) -> None:
    for start in (LEFT_HAND, RIGHT_HAND):
        for (a, b), colour in zip(FINGERS, FINGER_COLOURS, strict=True):
            if known[start + a] and known[start + b]:
                cv2.line(canvas, tuple(at[start + a]), tuple(at[start + b]), colour, max(1, thick // 2))
        for point in np.flatnonzero(known[start : start + HAND]):
            cv2.circle(canvas, tuple(at[start + point]), thick, (0, 0, 255), -1)
    face = WHOLE - FACE
    for point in np.flatnonzero(known[face:]):
        cv2.circle(canvas, tuple(at[face + point]), max(1, round(0.75 * thick)), (255, 255, 255), -1)


def mirror(people: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The people in the mirrored picture, where a left hand is a right one."""
    return [np.column_stack([1 - p[:, 0], p[:, 1:]])[_mirrored(len(p))] for p in people]


def _mirrored(points: int) -> list[int]:
    if points == len(JOINTS):
        return MIRRORED
    hands = [*range(RIGHT_HAND, RIGHT_HAND + HAND), *range(LEFT_HAND, LEFT_HAND + HAND)]
    return MIRRORED + hands + [WHOLE - FACE + i for i in MIRRORED_FACE]


def whole(joints: np.ndarray, left: np.ndarray | None, right: np.ndarray | None, face: np.ndarray | None) -> np.ndarray:
    """A person (130, 3) of joints (18, 3), hands (21, 3) and a face (70, 3); what is None is unknown."""
    parts = ((left, HAND), (right, HAND), (face, FACE))
    return np.concatenate([joints, *(np.zeros((count, 3)) if part is None else part for part, count in parts)])


def seen(person: np.ndarray) -> np.ndarray:
    """A person whose points beyond the picture's borders are unknown: a detector only guesses them."""
    inside = np.all((person[:, :2] >= 0) & (person[:, :2] <= 1), axis=1)
    return np.where(inside[:, None], person, 0.0)


def cut_people(people: Sequence[np.ndarray], left: float, top: float, width: float, height: float) -> list[np.ndarray]:
    """The people in coordinates of a part of the picture; all four numbers are fractions of the whole."""
    return [np.column_stack([(p[:, 0] - left) / width, (p[:, 1] - top) / height, p[:, 2]]) for p in people]


def crossing(person: np.ndarray) -> np.ndarray:
    """(18,) bool: the joints of arms and legs that cross another limb, or the trunk, of a person (18, 3)."""
    at, found = person[:, :2], np.zeros(len(JOINTS), bool)

    def side(a: int, b: int, c: int) -> float:
        (x, y), (u, v) = at[b] - at[a], at[c] - at[a]
        return x * v - y * u

    for a, b in ARMS_AND_LEGS:
        for c, d in BODY:
            known = not {a, b} & {c, d} and person[[a, b, c, d], 2].all()
            if known and side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0:
                found[[a, b]] = True
    return found


def to_text(people: Sequence[np.ndarray]) -> list[list[list[float]]]:
    """People as the `keypoints` field of a map's PNG text."""
    return [[[round(float(v), 5) for v in joint] for joint in person] for person in people]


def from_text(fields: dict, name: str) -> list[np.ndarray] | None:
    """The people in a map's PNG text, None if it has no key points. Raises InputError for wrong counts or numbers."""
    if "keypoints" not in fields:
        return None
    try:
        people = [np.asarray(person, np.float64) for person in fields["keypoints"]]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: its key points are no numbers ({error})") from error
    for person in people:
        if person.shape not in ((len(JOINTS), 3), (WHOLE, 3)):
            raise InputError(
                f"{name}: key points of shape {person.shape}, expected ({len(JOINTS)}, 3) or ({WHOLE}, 3) per person"
            )
        if not (np.abs(person) <= FAR).all():
            raise InputError(f"{name}: key points that are NaN or farther than {FAR} pictures away")
    return people
