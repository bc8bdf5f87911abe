"""Names of models outside the tables: files, and ids of the model hub. Loads no library."""

from __future__ import annotations

import re
from pathlib import Path

FILE_ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Endings of single files."""


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form OWNER/NAME, and not a file's."""
    parts = name.split("/")
    well = len(parts) == 2 and all(re.fullmatch(r"\w([\w.-]*\w)?", part) for part in parts)
    return well and ".." not in name and "--" not in name and Path(name).suffix not in FILE_ENDINGS
