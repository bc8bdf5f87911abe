"""The kinds of condition: one row each.

The look of a kind's maps decides how they are brought to a canvas, mirrored, checked, written and scored. A kind
without a row is the user's own and is treated as a plain picture.

To add one: a row below. Its detectors are rows in `detectors/registry.py`, its ControlNets rows in `model/registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

PICTURE, LINES, HARD_LINES, PEOPLE, PALETTE = "picture", "lines", "hard lines", "people", "palette"
"""The forms of maps: any picture; white and grey lines on black; only white lines on black; coloured skeletons; flat
colours that each mean something."""


@dataclass(frozen=True)
class Kind:
    """How the maps of a kind are treated."""

    name: str
    form: str = PICTURE
    score: str | None = None
    """How an image is scored against such a map: lines, depth or people (`model/work/score.py`); None: not at all."""
    two_levels: bool = False
    """Its maps are black and white, and are compressed as such."""
    union_type: int | None = None
    """Its type in a union of ControlNets (`model/control/union.py`); some unions have the first six only."""
    hides: bool = False
    """Its maps are pictures of which a part is hidden."""
    signed_x: bool = False
    """Red is the signed x direction that a surface faces, so mirroring inverts it."""

    @property
    def is_lines(self) -> bool:
        return self.form in (LINES, HARD_LINES)


def _table(*rows: Kind) -> dict[str, Kind]:
    table = {row.name: row for row in rows}
    if len(table) < len(rows):
        raise ValueError(f"two rows for one kind among {', '.join(row.name for row in rows)}")
    return table


KINDS = _table(
    Kind("canny", HARD_LINES, "lines", two_levels=True, union_type=3),
    Kind("pose", PEOPLE, "people", union_type=0),
    Kind("depth", PICTURE, "depth", union_type=1),
    Kind("normal", PICTURE, signed_x=True, union_type=4),
    Kind("softedge", LINES, "lines", union_type=2),
    Kind("scribble", LINES, "lines", two_levels=True, union_type=2),
    Kind("lineart", LINES, "lines", union_type=3),
    Kind("lineart_anime", LINES, union_type=3),
    Kind("mlsd", HARD_LINES, "lines", two_levels=True, union_type=3),
    Kind("seg", PALETTE, union_type=5),
    Kind("region", two_levels=True),
    Kind("tile", union_type=6),
    Kind("inpaint", union_type=7, hides=True),
    Kind("ip2p"),
    Kind("shuffle"),
    Kind("recolor"),
    Kind("blur"),
    Kind("invert", LINES),
)


def union_kinds(types: int) -> tuple[str, ...]:
    """The kinds of condition that a union with so many types knows, in the order of its types."""
    known = [kind for kind in KINDS.values() if kind.union_type is not None and kind.union_type < types]
    return tuple(kind.name for kind in sorted(known, key=lambda kind: kind.union_type or 0))


def can_be_steadied(name: str) -> bool:
    """Whether maps of a kind can be held steady over the frames of a video (`steady`)."""
    return kind_named(name).form == PEOPLE or kind_named(name).score == "depth"


def stands_in(kind: str, other: str) -> bool:
    """Whether a map of one kind may be taken for one of another: line maps may, and those of which nothing is known."""
    if kind not in KINDS or other not in KINDS or kind.split("_")[0] == other.split("_")[0]:
        return True
    return KINDS[kind].is_lines and KINDS[other].is_lines


def kind_named(name: str) -> Kind:
    """The row of a kind; for one that is not in the table a new row, as a picture."""
    return KINDS.get(name, Kind(name))
