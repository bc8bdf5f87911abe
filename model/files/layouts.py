"""The layouts of models on disk: each reads and writes. To add one: a file beside this one, and its row in LAYOUTS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlnet.model.files.folder import Folder, write_folder
from controlnet.model.files.single import SingleFile, write_single
from controlnet.model.files.stored import Stored
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.files import is_dir, is_file

LAYOUTS: dict[str, Callable[[Stored, Path, dict[str, Any] | None, str | None], None]] = {
    "diffusers": write_folder,
    "original": write_single,
}
"""Name -> how a model is written in it."""


def open_model(path: Path) -> Stored:
    """What is at `path`. Raises ModelError for what is neither a base nor a ControlNet."""
    path = Path(path)
    if is_dir(path):
        return Folder(path)
    if not is_file(path):
        raise ModelError(f"{path}: no such file or folder", f"ls {path.parent}")
    return SingleFile(path)
