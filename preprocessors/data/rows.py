"""Metadata of training data: rows of JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from controlnet.preprocessors.errors import InputError, reason
from controlnet.preprocessors.files import is_file, read_text
from controlnet.preprocessors.jsons import read_object

CAPTION_COLUMNS = ("text", "prompt", "caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def metadata_of(folder: Path) -> Path | None:
    """The metadata file of a folder, if it has one."""
    return next((folder / name for name in METADATA if is_file(folder / name)), None)


def json_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines. Raises InputError for a line that is not a JSON object."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would cut at U+2028 inside a caption
        if line.strip():
            rows.append(read_object(line, f"{path} line {number}"))
    return rows


def rows_of(path: Path) -> list[dict]:
    """The rows of a metadata file. Raises InputError for a file that cannot be read, and for a row without a
    file_name."""
    if path.suffix == ".jsonl":
        rows = json_lines(path)
    elif path.suffix == ".parquet":
        rows = parquet_rows(str(path), path.read_bytes())
    else:
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        except csv.Error as error:
            raise InputError(f"{path}: not CSV ({error})") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise InputError(f"{path}: row {number} has no file_name")
    return rows


def parquet_rows(path: str, data: bytes) -> list[dict]:
    """The rows of a Parquet file. Raises InputError for one that is none, and if the package that reads it is
    missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading it needs pyarrow", "pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False, pre_buffer=False).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({reason(error)})") from error


def caption_of(row: dict, where: str) -> str:
    """The caption of a row. Raises InputError for one with half a character (a lone surrogate) in it."""
    caption = next((str(row[c]) for c in CAPTION_COLUMNS if row.get(c)), "")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a caption with half a character in it (position {error.start})") from error
    return caption
