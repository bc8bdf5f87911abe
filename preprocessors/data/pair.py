"""Training data: a pair, and a source of pairs. A folder is one (`Pairs`); a stream is another (stream.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from controlnet.preprocessors.condition import Condition, condition_of
from controlnet.preprocessors.images import read_bytes, read_image


@dataclass(frozen=True)
class Pair:
    """A picture, its condition (None: to be made from the picture) and its caption ("" for none)."""

    image: Path
    condition: Path | None
    caption: str
    held_out: bool | None = None
    """Whether the data's own split holds it out from training; None if there is no split."""
    maps: tuple[Path, ...] = ()
    """All its conditions, if it has several; `condition` is the first one."""

    def of_kind(self, kind: str) -> Self:
        """The pair with that one of its conditions whose name says this kind, `0001.depth.png`, if one does."""
        own = next((path for path in self.maps if path.stem.endswith(f".{kind}")), self.condition)
        return replace(self, condition=own) if own != self.condition else self

    @property
    def name(self) -> str:
        """The picture's file name, without folders."""
        return self.image.name

    def read(self, file: Path) -> bytes:
        """The bytes of one of its two files. Raises InputError."""
        return read_bytes(str(file))

    def digest(self, file: Path, hash_of: Callable[[Path], str]) -> str:
        """The sha256 of one of its two files; `hash_of` remembers those of files on disk."""
        return hash_of(file)

    def picture(self) -> np.ndarray:
        """The picture, (H, W, 3) uint8 RGB. Raises InputError for a file that cannot be read."""
        return read_image(self.read(self.image), str(self.image))[0]

    def read_condition(self, kind: str) -> Condition | None:
        """The condition, as one of this kind; None if it is to be made from the picture. Raises InputError for a file
        that cannot be read."""
        if self.condition is None:
            return None
        return condition_of(self.read(self.condition), str(self.condition), kind)


@dataclass(frozen=True)
class HeldPair(Pair):
    """A pair whose files are at hand, since they come out of a table; `image` and `condition` only name them."""

    files: dict[Path, bytes] = field(default_factory=dict)

    def read(self, file: Path) -> bytes:
        return self.files[file]

    def digest(self, file: Path, hash_of: Callable[[Path], str]) -> str:
        return hashlib.sha256(self.files[file]).hexdigest()


class Source(Protocol):
    """What training reads pairs from."""

    @property
    def folder(self) -> Path | str:
        """Its name: a folder, or the URL of a stream."""

    @property
    def form(self) -> str:
        """Its form in one word, for the record."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """All pairs; the first ones of a stream."""

    @property
    def manifest(self) -> dict:
        """What the data says of itself; `kind` is that of its conditions."""


@dataclass(frozen=True)
class Pairs:
    """What was found in a folder. `missing` names files that are listed but not there, `extra` files without a partner,
    `skipped` files that look like data but are not used, each with the reason."""

    folder: Path
    form: str
    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    manifest: dict = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
