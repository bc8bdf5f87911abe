"""The pictures below a folder, without those that this toolkit wrote itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from controlnet.preprocessors.detectors.registry import DETECTORS
from controlnet.preprocessors.errors import InputError
from controlnet.preprocessors.files import is_file
from controlnet.preprocessors.images import suffixes, why_skipped
from controlnet.preprocessors.jsons import object_or_empty

OWN_FILES = {"run.json": ("settings",), "manifest.json": ("kind", "pairs")}
"""Files that mark a folder of this toolkit, a training run or a built data set, by keys that they have."""
SHEET_SUFFIX = "-check.png"


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted. Raises InputError for a folder that cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})", f"ls -ld {quote(str(folder))}") from error


@dataclass
class Below:
    """What a walk through a folder sees."""

    pictures: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    """Folders below that hold data in a form of their own."""


def look(folder: Path, is_data: Callable[[Path], bool], leave: tuple[Path, ...] = ()) -> Below:
    """All pictures below a folder, without those that this toolkit wrote, and without the folders to `leave`. `is_data`
    says whether a folder below holds data in a form of its own."""
    seen = Below()
    for place, names in _walk(folder, leave):
        if place != folder and is_data(place):
            seen.data.append(place)
        for name in names:
            path = place / name
            if path.suffix.lower() in suffixes():
                if not _is_own(path):
                    seen.pictures.append(path)
            elif why := why_skipped(path):
                seen.skipped.append(f"{path.relative_to(folder)} ({why})")
    seen.pictures.sort(key=lambda picture: picture.parts)
    return seen


def _walk(folder: Path, leave: tuple[Path, ...]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its files) for a folder and all below it, each once even if links form a loop."""
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        try:
            stat = Path(place).stat()
        except OSError:
            folders.clear()
            continue
        if (stat.st_dev, stat.st_ino) in visited:
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".")
            and Path(place, f) not in leave
            and not any(_has(Path(place, f, own), keys) for own, keys in OWN_FILES.items())
        )
        yield Path(place), [name for name in names if name[0] != "."]


def _has(path: Path, keys: tuple[str, ...]) -> bool:
    """Whether a file is there and holds a JSON object with these keys."""
    return is_file(path) and all(key in object_or_empty(path.read_bytes()) for key in keys)


def _is_own(path: Path) -> bool:
    """Whether a picture is a map that lies beside its photo, or a sheet of `dataset check`."""
    stem, _, kind = path.stem.rpartition(".")
    if kind in DETECTORS and any(is_file(path.parent / f"{stem}{suffix}") for suffix in suffixes()):
        return True
    return path.name.endswith(SHEET_SUFFIX)
