"""Key points as in OpenPose's JSON files: in pixels, 18 joints per person, with hands and face if they are known."""

from __future__ import annotations

import json

import numpy as np
from controlnet.preprocessors.errors import InputError, NothingFoundError
from controlnet.preprocessors.geometry import window
from controlnet.preprocessors.images import MAX_PIXELS
from controlnet.preprocessors.skeleton import FACE, HAND, JOINTS, WHOLE, cut_people, draw, from_text, to_text, whole

BODY_25 = [*range(8), *range(9, 19)]
"""The 18 joints among OpenPose's 25: all but the middle of the hips and the feet."""
BODY = "pose_keypoints_2d"
PARTS = {"hand_left_keypoints_2d": HAND, "hand_right_keypoints_2d": HAND, "face_keypoints_2d": FACE}
"""The rest of a person, in the order of `skeleton`, with the number of points."""


def to_json(people: list, size: tuple[int, int]) -> bytes:
    """A file for people given as fractions (a map's `keypoints`) of a canvas of `size` (width, height)."""

    def pixels(points: list) -> list[float]:
        return [round(v, 3) for x, y, c in points for v in (x * size[0] * (c > 0), y * size[1] * (c > 0), c)]

    rows = []
    for person in people:
        row = {BODY: pixels(person[: len(JOINTS)])}
        start = len(JOINTS)
        for part, count in PARTS.items() if len(person) == WHOLE else ():
            row[part] = pixels(person[start : start + count])
            start += count
        rows.append(row)
    file = {"people": rows, "canvas_width": size[0], "canvas_height": size[1]}
    return (json.dumps(file) + "\n").encode()


def from_json(data: bytes, name: str, size: tuple[int, int] = (0, 0)) -> tuple[list[np.ndarray], tuple[int, int]]:
    """(people, (width, height) of their canvas). OpenPose's own files name no canvas; theirs is `size`. Raises
    InputError for any other file, and for wrong counts or numbers."""
    try:
        file = json.loads(data)
        width, height = int(file.get("canvas_width", size[0])), int(file.get("canvas_height", size[1]))
        rows = [
            [np.asarray(person[BODY], np.float64), *(np.asarray(person.get(part) or [], np.float64) for part in PARTS)]
            for person in file["people"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{name}: is not OpenPose's JSON ({type(error).__name__}: {error}); expected people with pose_keypoints_2d,"
            " canvas_width, canvas_height",
            "controlnet detect pose PHOTO --keypoints points.json makes one",
        ) from error
    if not (width >= 8 and height >= 8 and width * height <= MAX_PIXELS):
        raise InputError(
            f"{name}: canvas {width}x{height}, expected at least 8 on each side and at most {MAX_PIXELS:,} pixels"
        )

    # Pixels become fractions of the canvas.
    people = []
    for body, *parts in rows:
        if body.size == 75:
            body = body.reshape(25, 3)[BODY_25]
        if body.size != 54:
            raise InputError(
                f"{name}: a person of {body.size} numbers, expected 54 (18 joints of x, y, confidence) or 75 (BODY_25)"
            )
        for (part, count), row in zip(PARTS.items(), parts, strict=True):
            if row.size not in (0, 3 * count):
                raise InputError(f"{name}: {part} of {row.size} numbers, expected {3 * count}")
        known = [row.reshape(-1, 3) if row.size else None for row in parts]
        points = body.reshape(18, 3) if not any(row.size for row in parts) else whole(body.reshape(18, 3), *known)
        if not np.isfinite(points).all():
            raise InputError(f"{name}: a person with NaN or infinite numbers")
        person = points / (width, height, 1)
        outside = (person[:, :2] < -1) | (person[:, :2] > 2)
        if (outside.any(1) & (person[:, 2] > 0)).any():
            raise InputError(f"{name}: key points far outside the canvas of {width}x{height}; expected pixels of it")
        people.append(person)
    return people, (width, height)


def draw_json(
    data: bytes, name: str, size: tuple[int, int], resize: str, allow_empty: bool = False
) -> tuple[np.ndarray, dict]:
    """The pose map of such a file at another size, as `detect` would make it from the photo, and its key points. Raises
    NothingFoundError if nobody is in it, unless allow_empty."""
    people, canvas = from_json(data, name, size)
    people = [person for person in people if (person[:, 2] > 0).any()]
    if not people and not allow_empty:
        raise NothingFoundError(f"{name}: nobody in it", "--allow-empty makes a black map")
    left, top, width, height, size = window(canvas, size, resize)
    people = from_text({"keypoints": to_text(cut_people(people, left, top, width, height))}, name) or []
    return draw(people, size), {"keypoints": to_text(people)}
