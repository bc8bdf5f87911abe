"""Training data: a pair, and a source of pairs. A folder is one (`Pairs`); a stream may be another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from controlnet.preprocessors.condition import Condition, read_condition
from controlnet.preprocessors.images import read_bytes, read_image


@dataclass(frozen=True)
class Pair:
    """A picture, its condition (None: to be made from the picture) and its caption ("" for none)."""

    image: Path
    condition: Path | None
    caption: str
    held_out: bool | None = None
    """Whether the data's own split holds it out from training; None if there is no split."""

    @property
    def name(self) -> str:
        """The picture's file name, without folders."""
        return self.image.name

    def picture(self) -> np.ndarray:
        """The picture, (H, W, 3) uint8 RGB. Raises InputError for a file that cannot be read."""
        return read_image(read_bytes(str(self.image)), str(self.image))[0]

    def read_condition(self, kind: str) -> Condition | None:
        """The condition, as one of this kind; None if it is to be made from the picture. Raises InputError for a file
        that cannot be read."""
        return None if self.condition is None else read_condition(str(self.condition), kind)


class Source(Protocol):
    """What training reads pairs from."""

    @property
    def folder(self) -> Path: ...

    @property
    def form(self) -> str:
        """Its form in one word, for the record."""

    @property
    def pairs(self) -> Sequence[Pair]: ...


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
