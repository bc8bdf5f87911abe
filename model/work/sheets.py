"""Contact sheets to look at: what was detected, what was made from which conditions, and where control failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from controlnet.model.work.score import MEASURES, Scored
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_bytes, read_image
from controlnet.preprocessors.kinds import kind_named
from controlnet.preprocessors.sheet import contact_sheet

Cell = tuple[np.ndarray, str]
"""A picture (H, W, 3) uint8, and the words below it."""


def write_maps(path: Path, shown: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    """A sheet of photos, each with its maps beside it. `shown` is kind -> photo's name -> (photo, map)."""
    cells: list[Cell] = []
    for source in dict.fromkeys(source for kind in shown.values() for source in kind):
        own = {kind: pictures[source] for kind, pictures in shown.items() if source in pictures}
        cells.append((next(iter(own.values()))[0], Path(source).name))
        blank = 0 * cells[-1][0] + 255
        cells += [(own[kind][1], kind) if kind in own else (blank, f"no {kind}") for kind in shown]
    columns = len(shown) + 1
    _write(path, cells, 2 * columns if columns == 2 < len(cells) else columns)


def write_images(path: Path, rows: list[list[Cell]]) -> None:
    """A row for each image: its conditions, then itself."""
    columns = max(map(len, rows))
    blank = 0 * rows[0][0][0] + 255
    cells = [cell for row in rows for cell in [(blank, "")] * (columns - len(row)) + row]
    _write(path, cells, columns if columns > 2 else 2 * columns)


def write_overlay(path: Path, image: str, results: list[tuple[str, Scored]]) -> None:
    """A row for each condition of an image file: the image, what was asked for, what was found, where they differ."""
    picture, _ = read_image(read_bytes(image), image)
    cells: list[Cell] = []
    for name, one in results:
        legend = MEASURES[kind_named(one.kind).score or "lines"].legend
        cells += [
            (picture, Path(image).name),
            (one.condition, f"asked for: {Path(name.split(',')[0]).name}"),
            (one.found, "found on the image"),
            (one.shown, legend),
        ]
    _write(path, cells, 4)


def _write(path: Path, cells: list[Cell], columns: int) -> None:
    write_file(path, png_bytes(contact_sheet(cells, columns, 256)))
