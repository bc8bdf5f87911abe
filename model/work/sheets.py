"""Contact sheets to look at: what was made of which conditions, and where control failed."""

from __future__ import annotations

from pathlib import Path

from controlnet.model.work.score import MEASURES, Scored
from controlnet.preprocessors.images import read_bytes, read_image
from controlnet.preprocessors.kinds import kind_named
from controlnet.preprocessors.sheet import Cell, write_sheet


def write_images(path: Path, rows: list[list[Cell]]) -> None:
    """A row for each image: its conditions, then itself."""
    columns = max(map(len, rows))
    blank = 0 * rows[0][0][0] + 255
    cells = [cell for row in rows for cell in [(blank, "")] * (columns - len(row)) + row]
    write_sheet(path, cells, columns if columns > 2 else 2 * columns)


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
    write_sheet(path, cells, 4)
