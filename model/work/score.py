"""How well an image keeps to its conditions: each is detected again on the image, by its own detector, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import cv2
import numpy as np
from controlnet.model.sampling.canvas import detection_size, on_canvas, to_canvas
from controlnet.model.work.cluster import share
from controlnet.model.work.condition import ConditionFlag, found_now, parse_condition
from controlnet.model.work.crew import Crew, killed_twice
from controlnet.preprocessors.agreement import (
    aligned,
    depth_rmse,
    edge_f1,
    match_people,
    oks,
    pck,
    rank_correlation,
    ssim,
)
from controlnet.preprocessors.condition import Condition, read_condition, recorded, rgb
from controlnet.preprocessors.detectors.detector import Ready
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.errors import ControlNetError, InputError, UsageError, reason
from controlnet.preprocessors.geometry import fit, inside
from controlnet.preprocessors.images import read_bytes, read_image
from controlnet.preprocessors.kinds import KINDS, PEOPLE, kind_named
from controlnet.preprocessors.metadata import load, sha256
from controlnet.preprocessors.skeleton import JOINTS, draw
from controlnet.preprocessors.stage_one import stage_one

ASPECT = 0.05
"""How far the ratio of the image's aspect to the map's may be from 1."""
RESAMPLES = 2000
MOST_PIXELS = 16384
"""Of a side of a map that a record names."""
SCORED = tuple(name for name, kind in KINDS.items() if kind.score)


@dataclass(frozen=True)
class Scored:
    """The scores of an image for one condition, and the maps that were compared, at the image's size."""

    kind: str
    scores: dict[str, float]
    condition: np.ndarray
    found: np.ndarray
    shown: np.ndarray
    """Where they agree and where not, (H, W, 3) uint8."""

    @property
    def main(self) -> float:
        """The most telling score."""
        return self.scores[MEASURES[kind_named(self.kind).score or "lines"].main]


@dataclass(frozen=True)
class LineScores:
    """What became of a line of a file of images to score."""

    rows: list[tuple[str, str, str, dict[str, float]]] = field(default_factory=list)
    """(image, condition, kind, scores)."""
    error: ControlNetError | None = None
    said: tuple[str, ...] = ()
    """Warnings."""


Line = dict[str, Any] | UsageError
"""{"image": PATH, "cond": PATH or a list of them}, or why it is none."""


def score_lines(lines: list[Line], offline: bool, devices: list[str | None], ray: str | None) -> Iterator[LineScores]:
    """The scores of each line, in order, here or in several processes."""
    if devices or ray is not None:
        crew = Crew(partial(make_scorer, offline), _died, on_devices=False)
        yield from share(lines, crew, devices, ray)
        return
    yield from map(make_scorer(offline), lines)


def make_scorer(offline: bool, device: str | None = None) -> Callable[[Line], LineScores]:
    """The worker of a process."""
    said: list[str] = []
    scorer = Scorer(offline, said.append)

    def work(line: Line) -> LineScores:
        said.clear()
        try:
            image, conditions = _read_line(line)
            rows = [(image, cond, one.kind, one.scores) for cond, one in scorer.of_file(image, conditions)]
            return LineScores(rows, said=tuple(said))
        except ControlNetError as error:
            return LineScores(error=error, said=tuple(said))

    return work


def _died(line: Line) -> LineScores:
    return LineScores(error=killed_twice())


def _read_line(given: Line) -> tuple[str, list[str]]:
    """(image, conditions). Raises UsageError."""
    if isinstance(given, UsageError):
        raise given
    if unknown := given.keys() - {"image", "cond"}:
        raise UsageError(f"unknown key {sorted(unknown)[0]!r}, expected image and cond", '{"image": "a.png"}')
    image, conditions = given.get("image"), given.get("cond") or []
    if not isinstance(image, str) or not image:
        raise UsageError("no image in it", '{"image": "out/7-photo.png", "cond": "photo.canny.png"}')
    conditions = [conditions] if isinstance(conditions, str) else conditions
    if not all(isinstance(c, str) for c in conditions):
        raise UsageError(f"cond: {conditions!r}, expected text or a list of texts", '"cond": "photo.canny.png"')
    return image, conditions


class Scorer:
    """Detects conditions again on images; each detector is loaded once."""

    def __init__(self, offline: bool = False, say: Callable[[str], None] = lambda text: None):
        self.offline, self.say = offline, say
        self.ready = cache(self._ready)

    def of_file(self, path: str, conditions: Sequence[str] = ()) -> list[tuple[str, Scored]]:
        """(condition, its scores) of an image file, for conditions PATH[,kind=KIND], by default those in its own
        record. Raises InputError for conditions that do not fit the image."""
        image, text = read_image(read_bytes(path), path)
        if conditions:
            return [(cond, self.of(image, path, cond)) for cond in conditions]
        entries = load(text).get("conditions", [])
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise InputError(
                f"{path}: its record is not whole (conditions: {entries!r})", "an image as generate wrote it"
            )
        if not entries:
            raise InputError(f"{path}: its record names no condition", f"controlnet score {path} --cond MAP")
        scored = [entry for entry in entries if kind_named(str(entry.get("kind"))).score]
        for entry in entries:
            if entry not in scored and scored:
                self.say(f"warning: {path}: kind {entry.get('kind')!r} has no score; {entry.get('path')} is left out")
        is_part = load(text).get("region_only") is True
        return [self.of_record(image, path, entry, is_part) for entry in scored or entries]

    def of_record(self, image: np.ndarray, name: str, entry: dict, is_part: bool = False) -> tuple[str, Scored]:
        """The scores for a condition in the image's own record. If it was made from a photo, it is made again. The
        entry's box is what the canvas showed of the condition's file, and of the image too where it `is_part` of it."""
        _check_entry(entry, name)
        path = found_now(entry["path"], name, "score")
        box = tuple(entry["box"]) if "box" in entry else None
        image, made = inside(image, box if is_part else None), entry.get("detect")
        if entry.get("sha256") not in (None, sha256(read_bytes(path))):
            self.say(f"warning: {path}: is not the file that {name} was made with")
        if made is None:
            condition = read_condition(path, entry["kind"], (image.shape[1], image.shape[0]))
            return path, self.of_canvas(image, condition if box is None else condition.within(box), name)
        photo, _ = read_image(read_bytes(path), path)
        ready = self.ready(made["kind"], made["detector"], json.dumps(made["options"]))
        again = stage_one(inside(photo, box), ready, tuple(made["size"]), made["resize"], path)
        return path, self.of_canvas(image, recorded(again.map, entry["kind"], path, made | again.record), name)

    def of_canvas(self, image: np.ndarray, condition: Condition, name: str) -> Scored:
        """The scores of what a canvas shows of an image for a condition that was brought to it: a map of another aspect
        was stretched, whatever its own record says."""
        if not _same_aspect(image, condition.map):
            self.check(condition)
            condition = on_canvas(condition, (image.shape[1], image.shape[0]))
        return self.compare(image, condition, name)

    def of(self, image: np.ndarray, name: str, cond: str) -> Scored:
        """The scores of an image (H, W, 3) uint8 for one condition, PATH[,kind=KIND], or of a photo PATH,detect=KIND.
        Raises UsageError for what only acts while an image is made."""
        flag, size = parse_condition(cond), (image.shape[1], image.shape[0])
        if flag != ConditionFlag(flag.path, flag.detect, flag.kind):
            raise UsageError(f"--cond {cond}: score knows kind= and detect= alone", f"--cond {flag.path}")
        if flag.detect is None:
            return self.compare(image, read_condition(flag.path, flag.kind, size), name)
        made = stage_one(flag.path, self.ready(flag.detect, None, "{}"), detection_size(size))
        return self.of_canvas(image, recorded(made.map, flag.kind or made.kind, flag.path, made.record), name)

    def compare(self, image: np.ndarray, condition: Condition, name: str) -> Scored:
        """The scores of an image (H, W, 3) uint8 for a condition. Raises as `check` does, and InputError if their
        aspects differ."""
        self.check(condition)
        if condition.record.get("resize") in ("crop", "pad") and not _same_aspect(image, condition.map):
            # The image may be the photo itself: it is brought to the map's size as the map's record says.
            image = fit(image, condition.size, condition.record["resize"])
        if not _same_aspect(image, condition.map):
            raise InputError(
                f"{condition.name}: {condition.size[0]}x{condition.size[1]}, of another aspect than {name},"
                f" {image.shape[1]}x{image.shape[0]}",
                "the map that the image was made from",
            )
        return MEASURES[kind_named(condition.kind).score or ""].function(self, image, condition)

    @staticmethod
    def check(condition: Condition) -> None:
        """Raises UsageError or InputError for a condition that no image can be scored against."""
        path, kind = condition.name, kind_named(condition.kind)
        if kind.score is None:
            raise UsageError(
                f"{path}: kind {kind.name!r} has no score; expected {', '.join(SCORED)}",
                "another condition; or kind=..., if the map is of another kind",
            )
        if kind.form == PEOPLE and "keypoints" not in condition.record:
            raise InputError(
                f"{path}: carries no key points in its PNG text",
                "a map of controlnet detect pose, or its --keypoints file",
            )
        if kind.form != PEOPLE and int(condition.map.max()) - int(condition.map.min()) < 8:
            raise InputError(f"{path}: one flat colour, there is nothing to keep to", "make the map again")

    def found(
        self, image: np.ndarray, size: tuple[int, int], condition: Condition, default: bool = False
    ) -> tuple[np.ndarray, dict]:
        """What the condition's own detector finds on the image at `size` (width, height), with the condition's own
        options, or with the `default` ones."""
        record = condition.record if condition.record.get("kind") == condition.kind else {}
        own = record.get("detector")
        ready = self.ready(
            condition.kind,
            own if isinstance(own, str) else None,
            json.dumps({} if default else record.get("options", {})),
        )
        return ready(fit(image, size, "stretch"))

    def _ready(self, kind: str, name: str | None, options: str) -> Ready:
        row = find_detector(kind, name)
        try:
            given = {**json.loads(options)} | ({"allow_empty": True} if kind_named(kind).form == PEOPLE else {})
            chosen = row.load_options()(**given)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the map's record has options that {row.name} does not know: {reason(error)}", "make the map again"
            ) from error
        return row.ready(chosen, offline=self.offline)


def score(path: str, conditions: Sequence[str] = (), offline: bool = False) -> list[tuple[str, Scored]]:
    """(condition, its scores) of one image file; see `Scorer.of_file`. For many images keep a `Scorer`."""
    return Scorer(offline).of_file(path, conditions)


def _same_aspect(image: np.ndarray, map_: np.ndarray) -> bool:
    ratio = map_.shape[1] / map_.shape[0] * image.shape[0] / image.shape[1]
    return abs(ratio - 1) <= ASPECT


def _lines(scorer: Scorer, image: np.ndarray, condition: Condition) -> Scored:
    """F1 of the lines, exact and within one pixel per 256 of the image's shorter side; structural similarity."""
    again, _ = scorer.found(image, condition.size, condition)
    size = (image.shape[1], image.shape[0])
    true, found = (to_canvas(m, condition.kind, size).max(2) for m in (condition.rgb, rgb(again)))
    near = max(1, round(min(size) / 256))
    lit_true, lit = ((m > 127).astype(np.uint8) * 255 for m in (true, found))
    scores = {"f1": edge_f1(lit, lit_true), "f1_near": edge_f1(lit, lit_true, near), "ssim": ssim(found, true)}
    shown = np.stack([lit_true, np.minimum(lit, lit_true), lit], 2)
    return Scored(condition.kind, scores, true, found, shown)


def _depth(scorer: Scorer, image: np.ndarray, condition: Condition) -> Scored:
    """Root mean square error after the best scale and shift, and the rank correlation."""
    again, _ = scorer.found(image, condition.size, condition, default=True)
    size = (image.shape[1], image.shape[0])
    true, found = (to_canvas(m, condition.kind, size)[..., 0] for m in (condition.rgb, rgb(again)))
    scores = {"rmse": depth_rmse(found, true), "rank_correlation": rank_correlation(found, true)}
    off = np.abs(aligned(found, true) - true).clip(0, 255).astype(np.uint8)
    return Scored(condition.kind, scores, true, found, cv2.applyColorMap(off, cv2.COLORMAP_INFERNO)[..., ::-1])


def _joints(person: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The joints (18, 3) of a person in pixels, without hands and face, which have no score."""
    return person[: len(JOINTS)] * (*size, 1)


def _people(scorer: Scorer, image: np.ndarray, condition: Condition) -> Scored:
    """Object keypoint similarity and the share of joints that are near, averaged over the people of the condition."""
    size = (image.shape[1], image.shape[0])
    asked = condition.people or []
    people = [joints for p in asked if ((joints := _joints(p, size))[:, 2] > 0).sum() >= 3]
    if not people:
        raise InputError(f"{condition.name}: nobody in it", "a map with people")
    # People are looked for at 512 pixels, as `detect` does.
    _, fields = scorer.found(image, (512 * size[0] // min(size), 512 * size[1] // min(size)), condition)
    others = [_joints(np.array(p), size) for p in fields["keypoints"]]
    pairs = match_people(others, people)
    nobody = np.zeros((18, 3))
    matched = [(nobody if i is None else others[i], people[k]) for i, k in pairs]
    scores = {measure.__name__: float(np.mean([measure(*pair) for pair in matched])) for measure in (oks, pck)}
    scores |= {"people": float(len(people)), "found": float(len(others))}
    shown = draw(asked, size) // 3
    for other, person in matched:
        for joint in np.flatnonzero((other[:, 2] > 0) & (person[:, 2] > 0)):
            a, b = (tuple(int(v) for v in p[joint, :2]) for p in (person, other))
            cv2.line(shown, a, b, (255, 60, 60), max(1, min(size) // 256))
            cv2.circle(shown, b, max(1, min(size) // 128), (255, 255, 255), -1)
    drawn = draw([other / (*size, 1) for other in others], size)
    return Scored(condition.kind, scores, draw(asked, size), drawn, shown)


@dataclass(frozen=True)
class Measure:
    """A way to score an image against a condition: the function, its most telling score, and what the colours of its
    picture mean."""

    function: Callable[[Scorer, np.ndarray, Condition], Scored]
    main: str
    legend: str


MEASURES = {
    "lines": Measure(_lines, "f1_near", "red missed, blue too much, white kept"),
    "depth": Measure(_depth, "rank_correlation", "off by: black little, yellow much"),
    "people": Measure(_people, "oks", "from where it should be to where it is"),
}
"""By `Kind.score`."""


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and its 95 % bootstrap interval (percentile; Efron 1979); equal values always give the same interval."""
    sample = np.asarray(values)
    rng = np.random.default_rng(0)
    means = sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(sample.mean()), float(low), float(high)


def _check_entry(entry: Any, image: str) -> None:
    """Raises InputError for an entry of a record that is not as `generate` writes it."""

    def has(fields: Any, **types: type | tuple[type, ...]) -> bool:
        return isinstance(fields, dict) and all(isinstance(fields.get(name), one) for name, one in types.items())

    made = entry.get("detect") if isinstance(entry, dict) else None
    whole = has(entry, path=str, kind=str) and (
        made is None or has(made, kind=str, detector=str, options=dict, size=list, resize=str)
    )
    if whole and "box" in entry:
        whole = _is_box(entry["box"])
    if whole and made is not None:
        whole = len(made["size"]) == 2 and all(isinstance(n, int) and 0 < n <= MOST_PIXELS for n in made["size"])
    if not whole:
        raise InputError(f"{image}: its record is not whole ({str(entry)[:80]})", "an image as generate wrote it")


def _is_box(box: Any) -> bool:
    """Whether a value is the sides of a part of a picture."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1
