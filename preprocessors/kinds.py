"""The kinds of condition: one row each.

What a kind's maps look like decides how they are brought to a canvas, mirrored, doubted, written and scored. A kind
that has no row is a picture of somebody's own.

To add one: a row below. A detector for it is a row in `detectors/registry.py`, a ControlNet one in `model/registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

PICTURE, LINES, HARD_LINES, PEOPLE = "picture", "lines", "hard lines", "people"
"""The forms of maps: any picture; white lines on black, grey ones among them; white lines alone; coloured skeletons."""


@dataclass(frozen=True)
class Kind:
    """How the maps of a kind are treated."""

    name: str
    form: str = PICTURE
    score: str | None = None
    """How an image is held against such a map: lines, depth or people (`model/work/score.py`)."""
    two_levels: bool = False
    """Its maps are black and white, and are compressed as such."""
    signed_x: bool = False
    """Red says which way a surface faces along x, and changes its sign in a mirror."""

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
    Kind("ip2p"),
)


def kind_named(name: str) -> Kind:
    """The row of a kind; for one of somebody's own a row of its own: a picture."""
    return KINDS.get(name, Kind(name))
