"""Contact sheets: pictures side by side with a line of text under each, for people who would rather look than read."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE = 8, 15
Cell = tuple[np.ndarray, str]
"""A picture (H, W) or (H, W, 3) uint8, and the words below it."""


def contact_sheet(pictures: list[Cell], columns: int, cell: int = 256) -> np.ndarray:
    """Cells in rows of `columns` -> one (H, W, 3) uint8 picture.

    Each picture is scaled to fit a square of `cell` pixels, small ones without smoothing; a row is as high as its
    highest picture.
    """
    font = ImageFont.load_default(12)
    texts = [textwrap.wrap(text, max(8, cell // 7)) for _, text in pictures]
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    ratios = [cell / max(image.shape[:2]) for image, _ in pictures]
    tall = [max(round(pictures[i][0].shape[0] * ratios[i]) for i in row) for row in rows]
    heights = [high + MARGIN + LINE * max(len(texts[i]) for i in row) for high, row in zip(tall, rows, strict=True)]
    width = columns * (cell + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height, high in zip(rows, heights, tall, strict=True):
        for column, i in enumerate(row):
            picture = Image.fromarray(pictures[i][0]).convert("RGB")
            ratio = ratios[i]
            size = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
            filter_ = Image.Resampling.NEAREST if ratio >= 2 else Image.Resampling.LANCZOS
            left = MARGIN + column * (cell + MARGIN)
            sheet.paste(picture.resize(size, filter_), (left + (cell - size[0]) // 2, top + (high - size[1]) // 2))
            for k, line in enumerate(texts[i]):
                draw.text((left, top + high + 4 + k * LINE), line, fill="black", font=font)
        top += height + MARGIN
    return np.asarray(sheet)


def write_sheet(path: Path, cells: list[Cell], columns: int) -> None:
    """A contact sheet as a PNG file. Raises OutputError."""
    write_file(path, png_bytes(contact_sheet(cells, columns)))
