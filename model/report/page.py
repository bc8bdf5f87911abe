"""Pages to look at: one HTML file each, with its pictures, styles and scripts in it. Nothing is loaded from outside."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.preprocessors.errors import OutputError, UsageError
from controlnet.preprocessors.files import write_file
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

MARK = '<meta name="generator" content="controlnet report">'
"""What tells a page of ours, which may be replaced, from another file."""
QUALITY = 82


def write_page(path: Path, template: str, title: str, data: dict[str, Any]) -> None:
    """Render a template with data, which its script reads as JSON, and write it whole. Raises OutputError."""
    environment = Environment(
        loader=PackageLoader("controlnet.model.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template(template).render(title=title, data=finite(data), mark=MARK)
    write_file(path, text.encode())


def finite(data: Any) -> Any:
    """The same data with None for numbers that JSON has not."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def check_page(path: Path, overwrite: bool) -> None:
    """Raises UsageError for a file of another sort, OutputError for one that is there and not a page of ours, unless it
    may be overwritten."""
    if path.suffix not in (".html", ".htm"):
        name = "report" if str(path) == "-" else path
        raise UsageError(f"{path}: a report is an HTML file", f"-o {name}.html")
    if path.exists() and not overwrite and MARK not in _head(path):
        raise OutputError(f"{path}: exists and is not a report", "--overwrite, or another -o FILE.html")


def _head(path: Path) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(2000)
    except OSError:
        return ""


def as_data(picture: np.ndarray, side: int) -> str:
    """A picture (H, W, 3) or (H, W) uint8 as a data URI, no longer than `side` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
