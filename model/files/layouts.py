"""The layouts of models on disk: how each is recognised, read and written. To add one: a file beside this one, and its
row in LAYOUTS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from controlnet.model.files.folder import Folder, write_folder
from controlnet.model.files.single import SingleFile, write_single
from controlnet.model.files.stored import Stored
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.files import is_dir, is_file


@dataclass(frozen=True)
class Layout:
    """A way to keep a model on disk."""

    is_at: Callable[[Path], bool]
    """Whether what is at a path may have it."""
    read: Callable[[Path], Stored]
    """Raises ModelError for what is neither a base nor a ControlNet."""
    write: Callable[[Stored, Path], None]
    """Raises ModelError for a model that it has no place for, OutputError when it cannot be written."""


LAYOUTS = {
    "diffusers": Layout(is_dir, Folder, write_folder),
    "original": Layout(is_file, SingleFile, write_single),
}


def open_model(path: Path) -> Stored:
    """What is at `path`. Raises ModelError for what is neither a base nor a ControlNet."""
    path = Path(path)
    for layout in LAYOUTS.values():
        if layout.is_at(path):
            return layout.read(path)
    raise ModelError(f"{path}: no such file or folder", f"ls {path.parent}")
