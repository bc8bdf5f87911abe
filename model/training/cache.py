"""Latents, text embeddings and conditions kept on disk, keyed by what they are made from, so each is computed once.

A key holds the content's hash and every setting that matters, so an entry for another base, size or detector is never
used. Entries are compressed numpy files, written whole or not at all; a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from controlnet.preprocessors.errors import OutputError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import object_or_empty
from controlnet.preprocessors.tars import mark_of, read_member, split


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Arrays in `folder`, by section and key; without a folder everything is made each time."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._hashes: dict[str, list] | None = None
        self._sizes: dict[str, list[int]] | None = None
        self._changed = False

    def array(self, section: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The entry, made and kept if it is not there. Raises OutputError when it cannot be kept."""
        if self.folder is None:
            return make()
        path = self.folder / section / key[:2] / f"{key}.npz"
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as entry:
                return entry["array"]
        except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            array = make()
            buffer = io.BytesIO()
            np.savez_compressed(buffer, array=array)
            self._write(path, buffer.getvalue())
            return array

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_file(path, data)
        except OutputError as error:
            raise OutputError(
                str(error),
                f"free some disk, or CONTROLNET_CACHE=DIR for another place than {self.folder}, or --set cache=false",
            ) from error

    def has_note(self, key: str) -> bool:
        """Whether `note` was called with this key."""
        return self.folder is not None and (self.folder / "notes" / key).is_file()

    def note(self, key: str) -> None:
        """Keep in mind that something is done."""
        if self.folder is not None:
            self._write(self.folder / "notes" / key, b"")

    def picture_size(self, digest: str, measure: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """(width, height) of the picture with this sha256, remembered unless it is empty."""
        if not digest:
            return measure()
        if self._sizes is None:
            self._sizes = self._kept("sizes.json")
        if digest not in self._sizes:
            self._sizes[digest] = list(measure())
            self._changed = True
        width, height = self._sizes[digest]
        return width, height

    def file_hash(self, path: Path) -> str:
        """sha256 of a file, remembered until its size or modification time changes."""
        inside = split(str(path))
        if inside is None:
            stat = path.stat()
            mark = [stat.st_size, stat.st_mtime_ns]
        else:
            mark = mark_of(*inside)
        name = os.path.abspath(path)  # noqa: PTH100 - of 100,000 files, a second sooner
        known = self._known().get(name)
        if known is None or known[:-1] != mark:
            data = read_member(*inside) if inside else path.read_bytes()
            known = [*mark, hashlib.sha256(data).hexdigest()]
            self._known()[name] = known
            self._changed = True
        return known[-1]

    def _known(self) -> dict[str, list]:
        if self._hashes is None:
            self._hashes = self._kept("files.json")
        return self._hashes

    def _kept(self, name: str) -> dict[str, list]:
        try:
            return object_or_empty((self.folder / name).read_bytes()) if self.folder else {}
        except OSError:  # if it cannot be written either, that is told
            return {}

    def remember(self) -> None:
        """Keep the files' hashes and sizes for the next run, beside those that other processes have kept."""
        for name, known in (("files.json", self._hashes), ("sizes.json", self._sizes)):
            if self.folder is not None and known and self._changed:
                self._write(self.folder / name, json.dumps(self._kept(name) | known).encode())
        self._changed = False
