"""What a detector is: a way of making a kind of condition from a photo. The table of them is `registry`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.log import doing

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class On:
    """Where a network of torch runs, and in which numbers; None is the best of this machine."""

    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Detector:
    """One way of making a kind of condition from a photo."""

    kind: str
    name: str
    function: str
    """`module:function`, imported when used; a module that begins with a dot is one of this package."""
    options: str
    """`module:dataclass`."""
    help: str
    weights: tuple[str, ...] = ()
    """The names of its weights, in weights.py."""
    torch: bool = False
    """Its network is torch's: the function is also told where it runs (`on`)."""
    beside: str = ""
    """The option that names a second picture, which is brought to the map's size as the photo was; the function gets it
    after the options, or None."""
    needs: tuple[str, str] = ("", "")
    """A module that the package does not always install, and the extra that does."""

    @property
    def title(self) -> str:
        return f"{self.kind}/{self.name}"

    def load_options(self) -> type:
        return self._resolve(self.options)

    def ready(
        self,
        options: Any,
        weights: Path | None = None,
        offline: bool = False,
        on_bytes: Callable[[int, int], None] = lambda done, of: None,
        on: On = On(),
    ) -> Ready:
        """This detector with these options. Weights come from the folder `weights` (for a detector with several, from
        folders in it with their names), else from the cache, else they are fetched. Raises ModelError when they are not
        available."""
        from controlnet.preprocessors.weights import find  # here: it imports code that uses the network

        module, extra = self.needs
        if module and importlib.util.find_spec(module) is None:
            raise ModelError(f"{self.title} needs {module}", f"pip install 'controlnet-toolkit[{extra}]'")
        several = weights is not None and len(self.weights) > 1
        folders = [
            find(name, weights / name if several and weights else weights, offline, on_bytes) for name in self.weights
        ]
        return Ready(self, options, self._resolve(self.function), tuple(folders), {"on": on} if self.torch else {})

    def _resolve(self, reference: str) -> Any:
        module, name = reference.split(":")
        return getattr(importlib.import_module(module, __package__), name)


Table = dict[str, dict[str, Detector]]
"""kind -> name -> detector; a kind's first one is its default."""


@dataclass(frozen=True)
class Ready:
    """A detector with its options and weights, ready to look at photos."""

    row: Detector
    options: Any
    function: Callable
    weights: tuple[Path, ...] = ()
    where: dict[str, On] | None = None

    def __call__(
        self, image: np.ndarray, place: Callable[[np.ndarray], np.ndarray] = lambda picture: picture
    ) -> tuple[np.ndarray, dict]:
        """A photo (H, W, 3) uint8 RGB -> its map, of the same height and width, and what else was found on it. `place`
        brings another picture to this size as the photo was."""
        second = (self._second(place),) if self.row.beside else ()
        with doing(f"{self.row.kind} by {self.row.name} on {image.shape[1]}x{image.shape[0]}"):
            made = self.function(image, self.options, *second, *self.weights, **(self.where or {}))
        return made if isinstance(made, tuple) else (made, {})

    def _second(self, place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
        from controlnet.preprocessors.images import read_bytes, read_image

        path = getattr(self.options, self.row.beside)
        return place(read_image(read_bytes(path), path)[0]) if path else None
