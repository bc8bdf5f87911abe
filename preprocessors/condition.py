"""A condition: a map of some kind, and what is known of how it was made. A file holds one, `stage_one` makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from controlnet.preprocessors.geometry import Box, inside
from controlnet.preprocessors.images import alpha_of, png_bytes, read_bytes, read_image
from controlnet.preprocessors.keypoints import draw_json
from controlnet.preprocessors.kinds import PEOPLE, kind_named
from controlnet.preprocessors.metadata import dump, kind_of, load
from controlnet.preprocessors.skeleton import cut_people, from_text


@dataclass(frozen=True, eq=False)
class Condition:
    """A map, as a detector made it or a file holds it."""

    map: np.ndarray
    """(H, W) or (H, W, 3), uint8; raw depth is uint16. (H, W, 4) where a part is transparent, because it is hidden."""
    kind: str
    name: str = "condition"
    """The name of its file or photo, for messages."""
    record: dict[str, Any] = field(default_factory=dict)
    """What its PNG text says: how it was made (stage_one.MAKING), and what was found (`keypoints`)."""
    people: list[np.ndarray] | None = None
    """For a pose, (18, 3) or (130, 3) per person (preprocessors.skeleton); None if they are not known."""
    alpha: np.ndarray | None = None
    """(H, W) uint8, of a file with transparency."""

    @cached_property
    def rgb(self) -> np.ndarray:
        """The map as (H, W, 3)."""
        return rgb(self.map)

    @property
    def seen(self) -> np.ndarray | None:
        """Where it is seen and hides nothing, (H, W) uint8: its map's fourth channel, else its file's transparency."""
        return self.map[..., 3] if self.map.ndim == 3 and self.map.shape[2] == 4 else self.alpha

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.map.shape[1], self.map.shape[0]

    def within(self, box: Box) -> Condition:
        """The part of it in a box. People are moved, and drawn anew where the map is brought to a canvas."""
        left, top, right, bottom = box
        people = None if self.people is None else cut_people(self.people, left, top, right - left, bottom - top)
        alpha = None if self.alpha is None else inside(self.alpha, box)
        return replace(self, map=inside(self.map, box), people=people, alpha=alpha)

    def png(self) -> bytes:
        """The map as a PNG file that carries its record."""
        return png_bytes(self.map, dump(self.record), two_levels=kind_named(self.kind).two_levels)


def rgb(map_: np.ndarray) -> np.ndarray:
    """A map (H, W), (H, W, 3) or (H, W, 4) as (H, W, 3)."""
    return np.ascontiguousarray(map_[..., :3]) if map_.ndim == 3 else np.repeat(map_[..., None], 3, 2)


def read_condition(
    path: str,
    kind: str | None = None,
    size: tuple[int, int] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Condition:
    """The condition in a file: a map, of the given kind or of the one in its text or name; or, if a `size` (width,
    height) to draw at is given, OpenPose's key points as JSON. Raises InputError for a file that is neither, UsageError
    if the kind is unknown."""
    if size is not None and is_keypoints(path):
        map_, record = draw_json(read_bytes(path), path, size, "stretch")
        return recorded(map_, "pose", path, record)
    return condition_of(read_bytes(path), path, kind, warn)


def condition_of(
    data: bytes, name: str, kind: str | None = None, warn: Callable[[str], None] = lambda text: None
) -> Condition:
    """The condition in the bytes of a map's file with this name. Raises as `read_condition` does."""
    map_, text = read_image(data, name, warn)
    return replace(recorded(map_, kind_of(name, text, kind), name, load(text)), alpha=alpha_of(data))


def recorded(map_: np.ndarray, kind: str, name: str, record: dict[str, Any]) -> Condition:
    """The condition of a map with the `record` from its PNG text. Raises InputError for key points that are damaged."""
    people = from_text(record, name) if kind_named(kind).form == PEOPLE else None
    return Condition(map_, kind, name, record, people)


def is_keypoints(path: str) -> bool:
    """Whether a file holds key points to be drawn, judged by its name."""
    return path.lower().endswith(".json")
