"""Finds what is wrong with training data before a day is spent on it; opens every picture once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from controlnet.preprocessors.condition import Condition, condition_of
from controlnet.preprocessors.data.pairs import Pair, Pairs, kind_of_pairs
from controlnet.preprocessors.data.stream import Stream
from controlnet.preprocessors.doubts import doubts_of
from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import read_image
from controlnet.preprocessors.sheet import Cell

SHOWN = 24
"""Pairs on the contact sheet."""
ASPECT_TOLERANCE = 0.02
"""Relative difference of the aspects of picture and condition."""


LEAST_PAIRS = 4
"""Training needs at least this many, since some are held out."""


@dataclass(frozen=True)
class Problem:
    """`level` is error (training would fail or learn nothing) or warning."""

    level: str
    what: str
    where: str


def same_aspect(a: tuple[int, int], b: tuple[int, int], tolerance: float = ASPECT_TOLERANCE) -> bool:
    """Whether two sizes (width, height) have the same aspect."""
    return abs(a[0] / a[1] / (b[0] / b[1]) - 1) <= tolerance


def check_pair(pair: Pair, kind: str) -> tuple[list[Problem], str, tuple[int, int] | None, np.ndarray | None]:
    """Problems of one pair, the sha256 of its picture's pixels, its size, and a preview, 256 pixels wide."""
    problems: list[Problem] = []
    name = str(pair.image)
    try:
        image, _ = read_image(pair.read(pair.image), name)
    except InputError as error:
        return [Problem("error", "corrupt picture", str(error))], "", None, None
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    preview = fit(image, (256, 256), "pad")
    if not pair.caption:
        problems.append(Problem("warning", "no caption", name))
    if pair.condition is not None:
        where = str(pair.condition)
        try:
            condition = condition_of(pair.read(pair.condition), where, kind)
        except InputError as error:
            return [*problems, Problem("error", "corrupt condition", str(error))], digest, image.shape[1::-1], preview
        preview = np.concatenate([fit(one, (128, 128), "pad") for one in (image, condition.rgb)], 1)
        problems += check_condition(condition, image.shape[1::-1])
    return problems, digest, image.shape[1::-1], preview


def check_condition(condition: Condition, size: tuple[int, int]) -> Iterator[Problem]:
    """What is doubted of a condition for a picture of `size` (width, height), and whether they fit."""
    where, (width, height) = condition.name, condition.size
    for doubt in doubts_of(condition):
        yield Problem("error" if doubt.certain else "warning", doubt.what, f"{where}: {doubt.text}")
    if not same_aspect((width, height), size):
        yield Problem("error", "another aspect", f"{where}: {width}x{height} for a picture of {size[0]}x{size[1]}")


def check_pairs(found: Pairs | Stream, kind: str, on_pair=lambda done: None) -> tuple[dict, list[Problem], list[Cell]]:
    """(counts, problems, up to 24 previews with what is said of them) of a whole data set. Pairs with an error are
    shown first."""
    problems = [Problem("warning", "missing file", name) for name in found.missing]
    problems += [Problem("warning", "extra file", name) for name in found.extra]
    problems += [Problem("warning", "skipped", text) for text in found.skipped]

    # Each pair by itself, and compared with those before it.
    sizes: dict[tuple[int, int], int] = {}
    seen: dict[str, str] = {}
    good: list[Cell] = []
    bad: list[Cell] = []
    for done, pair in enumerate(found.pairs, 1):
        own, digest, size, preview = check_pair(pair.of_kind(kind), kind)
        problems += own
        if size:
            sizes[size] = sizes.get(size, 0) + 1
        if digest and digest in seen:
            problems.append(Problem("warning", "duplicate", f"{pair.image} is {seen[digest]}"))
        seen.setdefault(digest, str(pair.image))
        if preview is not None:
            wrong = next((p.what for p in own if p.level == "error"), None)
            shown = bad if wrong else good
            if len(shown) < SHOWN:
                shown.append((preview, f"{wrong}: {pair.image.name}" if wrong else pair.caption or "(no caption)"))
        on_pair(done)

    # All of them together.
    if len(found.pairs) < LEAST_PAIRS:
        where = f"{found.folder}: {len(found.pairs)}, expected at least {LEAST_PAIRS}; hundreds are better"
        problems.append(Problem("error", "too few pairs", where))
    counts = {
        "form": found.form,
        "kind": kind,
        "pairs": len(found.pairs),
        "sizes": {f"{w}x{h}": n for (w, h), n in sorted(sizes.items(), key=lambda s: -s[1])[:5]},
        "errors": sum(p.level == "error" for p in problems),
        "warnings": sum(p.level == "warning" for p in problems),
    }
    return counts, problems, (bad + good)[:SHOWN]


def kind_or_unknown(found: Pairs | Stream, kind: str | None) -> tuple[str, str]:
    """The kind of a data set's conditions, and '' or why nobody can tell it."""
    try:
        return kind_of_pairs(found, kind or "")[0], ""
    except UsageError as error:
        return "unknown", str(error)
