"""Maps of a video's frames, steadied over time: poses follow their people, and depth keeps its scale. Each map is made
of its own frame and those before it, so nothing waits."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.kinds import PEOPLE, can_be_steadied, kind_named
from controlnet.preprocessors.skeleton import draw, to_text

KINDS = ("pose", "depth")
SLOW, FAST = 0.35, 1.0
"""How much of a joint's new place is taken when it hardly moves, and when it moves by STEP or more."""
STEP = 0.03
"""The movement of a joint from one frame to the next, as a fraction of the person's height, that is no trembling."""
KEPT = 3
"""For so many frames a joint that is not found stays where it was."""
SAME = 0.25
"""The largest mean distance, as a fraction of a person's height, from where the person was in the frame before."""
RANGE = 0.1
"""How much of the new black and white of a depth map is taken."""
SETTLED = 0.02
"""Depth that changes by less, as a fraction of its range, is averaged with the frame before."""


def check(kind: str) -> None:
    """Raises UsageError for a kind whose maps cannot be steadied."""
    if not can_be_steadied(kind):
        raise UsageError(f"--steady: {kind} maps cannot be steadied, only {' and '.join(KINDS)}", "leave --steady out")


class Steady:
    """Takes the conditions of one video in turn."""

    def __init__(self) -> None:
        self.people: list[tuple[np.ndarray, np.ndarray]] = []
        """Each person's joints (N, 3) and for how many frames each was not found."""
        self.near: np.ndarray | None = None
        """The depth of the frame before, as it was shown, in the network's numbers."""
        self.ends: tuple[float, float] | None = None
        """What is black and white in it."""

    def __call__(self, condition: Condition) -> Condition:
        if kind_named(condition.kind).form == PEOPLE:
            people = self.poses(condition.people or [])
            text = to_text(people)
            map_ = draw([np.array(person) for person in text], condition.size)
            return replace(condition, map=map_, people=people, record=condition.record | {"keypoints": text})
        return self.depth(condition)

    def poses(self, found: list[np.ndarray]) -> list[np.ndarray]:
        """The people (N, 3) of a frame, each near where it was in the one before."""
        before, now = list(self.people), []
        for person in found:
            known = person[:, 2] > 0
            height = max(float(np.ptp(person[known, 1])), 1e-3) if known.any() else 1e-3
            apart = [_apart(person, old, height) for old, _ in before]
            nearest = int(np.argmin(apart)) if apart else -1
            if nearest < 0 or apart[nearest] > SAME:
                now.append((person, np.zeros(len(person), int)))
            else:
                now.append(_followed(person, *before.pop(nearest), height))
        for old, missed in before:  # nobody is near: who is lost stays for a while as well
            person, again = _followed(np.zeros_like(old), old, missed, 1.0)
            if (person[:, 2] > 0).any():
                now.append((person, again))
        self.people = now
        return [person for person, _ in now]

    def depth(self, condition: Condition) -> Condition:
        """The depth map of a frame, in the scale of the one before: a network gives each frame a scale of its own."""
        ends = condition.record.get("normalisation", {"black": 0.0, "white": 1.0})
        top = np.iinfo(condition.map.dtype).max
        near = condition.map.astype(np.float32) / top * (ends["white"] - ends["black"]) + ends["black"]
        if self.near is not None and self.ends is not None and self.near.shape == near.shape:
            near = _scaled_to(near, self.near)
            span = max(self.ends[1] - self.ends[0], 1e-9)
            near = np.where(np.abs(near - self.near) < SETTLED * span, (near + self.near) / 2, near)
            new = float(near.min()), float(near.max())
            black, white = (a + RANGE * (b - a) for a, b in zip(self.ends, new, strict=True))
        else:
            black, white = ends["black"], ends["white"]
        self.near, self.ends = near, (black, white)
        shown = np.rint((near - black) / max(white - black, 1e-9) * top).clip(0, top).astype(condition.map.dtype)
        record = condition.record | {"normalisation": {"black": black, "white": white}}
        return replace(condition, map=shown, record=record)


def _apart(person: np.ndarray, old: np.ndarray, height: float) -> float:
    """The mean distance of the joints that both have, as a fraction of a height; infinite if there are none."""
    if len(person) != len(old):
        return float("inf")
    both = (person[:, 2] > 0) & (old[:, 2] > 0)
    return (
        float(np.linalg.norm(person[both, :2] - old[both, :2], axis=1).mean()) / height if both.any() else float("inf")
    )


def _followed(person: np.ndarray, old: np.ndarray, missed: np.ndarray, height: float) -> tuple[np.ndarray, np.ndarray]:
    """A person that was there before: what trembles is held, what moves is followed, what is lost stays for a while."""
    known, had = person[:, 2] > 0, old[:, 2] > 0
    moved = np.linalg.norm(person[:, :2] - old[:, :2], axis=1) / height
    share = np.clip(SLOW + (FAST - SLOW) * moved / STEP, SLOW, FAST)[:, None]
    steady = person.copy()
    both = known & had
    steady[both, :2] = (old[:, :2] + share * (person[:, :2] - old[:, :2]))[both]
    lost = ~known & had & (missed < KEPT)
    steady[lost] = old[lost]
    return steady, np.where(lost, missed + 1, 0)


def _scaled_to(near: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Depth in the scale of the frame before, by a line fitted to both where they are most alike."""
    x, y = (cv2.resize(one, (64, 64), interpolation=cv2.INTER_AREA).ravel() for one in (near, before))
    keep = np.ones(len(x), bool)
    scale, shift = 1.0, 0.0
    for _ in range(3):
        spread = float(np.var(x[keep]))
        if spread < 1e-12:
            return near
        scale = float(np.cov(x[keep], y[keep], bias=True)[0, 1]) / spread
        shift = float(y[keep].mean() - scale * x[keep].mean())
        off = np.abs(scale * x + shift - y)
        keep = off <= max(np.percentile(off, 70), 1e-9)  # what moves is left out
    return scale * near + shift if 0.2 < scale < 5 else near
