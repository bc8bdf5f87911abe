"""Where results go, and what is in their way: the rules of -o, --overwrite and --skip-existing."""

from __future__ import annotations

import os
from pathlib import Path

from controlnet.preprocessors.errors import OutputError, UsageError
from controlnet.preprocessors.files import exists, is_dir
from controlnet.preprocessors.remote import is_url, place

MAPS = (".png",)
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
"""The endings of what is written: a map must keep every pixel."""


def output_path(out: str | None, default: Path, several: bool, endings: tuple[str, ...] = MAPS) -> Path | None:
    """The path of a result, whose file may have these endings; None for standard output. `default` is taken if -o is
    not given, and its file name if -o is a folder."""
    if out is None:
        return default
    if is_folder(out, endings):
        return place(out) / default.name
    if several:
        hint = "-o DIR/" if out == "-" else f"-o {place(out).with_suffix('')}/"
        raise UsageError(f"-o {out} takes one result, but there are several", hint)
    return None if out == "-" else place(out)


def is_folder(out: str, endings: tuple[str, ...] = MAPS) -> bool:
    """Whether -o names a folder: anything but `-` and names with these endings. Raises UsageError for another type of
    picture."""
    path = place(out)
    if out.endswith("/") or is_dir(path):
        return True
    check_png("-o", path, endings)
    return out != "-" and path.suffix.lower() not in endings


def check_png(flag: str, path: Path, endings: tuple[str, ...] = MAPS) -> None:
    """Raises UsageError for a path with the ending of a picture type that is not written."""
    if path.suffix.lower() in ("", ".apng", *endings):
        return
    from controlnet.preprocessors.images import suffixes  # here: it imports all that Pillow reads

    if path.suffix.lower() in suffixes():
        written = "PNG" if endings == MAPS else "PNG, JPEG or WebP"
        raise UsageError(
            f"{flag} {path}: pictures are written as {written} files", f"{flag} {path.with_suffix('.png')}"
        )


def check_existing(overwrite: bool, skip_existing: bool) -> None:
    """Raises UsageError for what cannot both be done with a result that is there."""
    if overwrite and skip_existing:
        raise UsageError("--overwrite replaces what is there, --skip-existing leaves it", "one of the two")


def keeps(path: Path, overwrite: bool, skip_existing: bool) -> bool:
    """Whether an existing result is to be left alone. Raises OutputError when it is in the way, or when its place
    cannot be written, so that this is known before the work."""
    there = None if is_url(path) else next(p for p in path.absolute().parents if exists(p))
    if there is not None and not (there.is_dir() and os.access(there, os.W_OK)):
        raise OutputError(
            f"{path}: cannot be written, {there} is {'not writable' if there.is_dir() else 'a file'}",
            "choose another place with -o DIR/",
        )
    if is_dir(path):
        raise OutputError(f"{path}: is a folder, expected a file", f"-o {path}/")
    if overwrite or not exists(path):
        return False
    if skip_existing:
        return True
    raise exists_already(path)


def exists_already(path: Path | None) -> OutputError:
    """The error for a result that is in the way."""
    return OutputError(f"{path}: exists already", "add --overwrite to replace it, or --skip-existing to leave it")
