"""The kinds of condition: one row each.

The look of a kind's maps decides how they are brought to a canvas, mirrored, checked, written and scored. A kind
without a row is the user's own and is treated as a plain picture.

To add one: a row below. Its detectors are rows in `detectors/registry.py`, its ControlNets rows in `model/registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

PICTURE, LINES, HARD_LINES, PEOPLE = "picture", "lines", "hard lines", "people"
"""The forms of maps: any picture; white and grey lines on black; only white lines on black; coloured skeletons."""


@dataclass(frozen=True)
class Kind:
    """How the maps of a kind are treated."""

    name: str
    form: str = PICTURE
    score: str | None = None
    """How an image is scored against such a map: lines, depth or people (`model/work/score.py`); None: not at all."""
    two_levels: bool = False
    """Its maps are black and white, and are compressed as such."""
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
    Kind("canny", HARD_LINES, "lines", two_levels=True),
    Kind("pose", PEOPLE, "people"),
    Kind("depth", PICTURE, "depth"),
    Kind("normal", PICTURE, signed_x=True),
    Kind("softedge", LINES, "lines"),
    Kind("scribble", LINES, "lines", two_levels=True),
    Kind("lineart", LINES, "lines"),
    Kind("lineart_anime", LINES),
    Kind("mlsd", HARD_LINES),
    Kind("seg"),
    Kind("tile"),
    Kind("inpaint"),
    Kind("ip2p"),
)


def kind_named(name: str) -> Kind:
    """The row of a kind; for one that is not in the table a new row, as a picture."""
    return KINDS.get(name, Kind(name))
