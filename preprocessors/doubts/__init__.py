"""Conditions that are probably wrong, noticed before a network wastes its time on them.

Nothing here is certain: a doubt is a warning with a cure, and an error only on request (--strict). How often each one
is right is in benchmarks/LOG.md (`python benchmarks/doubts.py`). To add one: a function in one of the files here, and
its name in CHECKS.
"""

from __future__ import annotations

import numpy as np
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.doubts import files, lines, poses, values
from controlnet.preprocessors.doubts.look import Doubt, Look
from controlnet.preprocessors.kinds import kind_named

CHECKS = (
    files.transparent, files.of_another_kind, files.map_of_a_map, values.empty, lines.not_lines, lines.inverted,
    lines.grey, lines.doubled, poses.without_skeleton, poses.exchanged, values.coloured_depth, values.reversed_depth,
    values.exchanged_normals, values.not_normals, values.off_palette, files.of_another_size, files.of_another_aspect,
)  # fmt: skip
"""Each takes a Look and returns a Doubt or None, in the order in which faults are mended."""
OUTWEIGHS = {
    "transparency": (
        "empty condition",
        "inverted lines",
        "no line map",
        "grey lines",
        "doubled lines",
        "no skeleton",
    ),
    "empty condition": (
        "colours beyond the palette",
        "inverted lines",
        "grey lines",
        "coloured depth",
        "reversed depth",
        "no normal map",
    ),
    "inverted lines": ("grey lines", "doubled lines"),
    "no line map": ("inverted lines", "grey lines", "doubled lines"),
    "coloured depth": ("reversed depth",),
    "no skeleton": ("red and blue exchanged",),
    "red and blue exchanged": ("no normal map", "colours beyond the palette"),
}
"""Of two faults that one cause makes, the one that is told."""


def doubts(
    condition: np.ndarray,
    kind: str,
    size: tuple[int, int] | None = None,
    alpha: np.ndarray | None = None,
    record: dict | None = None,
) -> list[Doubt]:
    """What looks wrong with a condition (H, W, 3) uint8 of a kind, for a canvas or picture of `size` (width, height).
    Its file may also have an `alpha` (H, W) uint8, and a `record` in its PNG text."""
    look = Look(condition, kind_named(kind), size, alpha, record or {})
    found = [doubt for check in CHECKS if (doubt := check(look)) is not None]
    lesser = {what for doubt in found for what in OUTWEIGHS.get(doubt.what, ())}
    return [doubt for doubt in found if doubt.what not in lesser]


def doubts_of(condition: Condition, size: tuple[int, int] | None = None) -> list[Doubt]:
    """The same of a condition that was read from a file."""
    return doubts(condition.rgb, condition.kind, size, condition.alpha, condition.record)


def mend(condition: Condition) -> tuple[np.ndarray, list[Doubt]]:
    """The map (H, W, 3) uint8 of a condition with all mended that can be, and the faults that were."""
    map_, alpha = condition.rgb, condition.alpha
    mended: list[Doubt] = []
    while len(mended) < len(CHECKS):
        done = {doubt.what for doubt in mended}
        found = doubts(map_, condition.kind, None, alpha, condition.record)
        first = next((doubt for doubt in found if doubt.mend and doubt.what not in done), None)
        if first is None or first.mend is None:
            break
        map_, alpha = first.mend(), None
        mended.append(first)
    return map_, mended
