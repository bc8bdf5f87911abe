"""What need not be computed twice: latents, text embeddings and conditions on disk, keyed by what they are made of.

A key holds the content's hash and every setting that matters, so an entry of another base, size or detector is never
found. Entries are numpy files, whole or not there; a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from controlnet.preprocessors.images import write_file


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Arrays in `folder`, by section and key; without a folder everything is made each time."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._hashes: dict[str, list] | None = None

    def array(self, section: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The entry, made and kept if it is not there."""
        if self.folder is None:
            return make()
        path = self.folder / section / key[:2] / f"{key}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            array = make()
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            write_file(path, buffer.getvalue())
            return array

    def file_hash(self, path: Path) -> str:
        """sha256 of a file, remembered by its size and time of change."""
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        known = self._known().get(str(path.absolute()))
        if known is None or known[:2] != mark:
            known = [*mark, hashlib.sha256(path.read_bytes()).hexdigest()]
            self._known()[str(path.absolute())] = known
        return known[2]

    def _known(self) -> dict[str, list]:
        if self._hashes is None:
            path = self.folder / "files.json" if self.folder else None
            try:
                self._hashes = json.loads(path.read_text()) if path else {}
            except (FileNotFoundError, ValueError):
                self._hashes = {}
        return self._hashes

    def remember(self) -> None:
        """Keep the files' hashes for the next run."""
        if self.folder is not None and self._hashes:
            write_file(self.folder / "files.json", json.dumps(self._hashes).encode())
