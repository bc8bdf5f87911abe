"""What a detector is: a way of making a kind of condition from a photo. The table of them is `registry`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlnet.preprocessors.errors import ControlNetError, ModelError, reason
from controlnet.preprocessors.log import doing

if TYPE_CHECKING:
    import numpy as np


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a module in a package that is not there
        return False


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
    plugin: str = ""
    """The package that adds it, if it is none of ours."""

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
        if module and not is_installed(module):
            what = extra if self.plugin else f"'controlnet-toolkit[{extra}]'"
            raise ModelError(f"{self.title} needs {module}", f"pip install {what}")
        several = weights is not None and len(self.weights) > 1
        folders = [
            find(name, weights / name if several and weights else weights, offline, on_bytes) for name in self.weights
        ]
        with _blamed_on(self):
            function = self._resolve(self.function)
        return Ready(self, options, function, tuple(folders), {"on": on} if self.torch else {})

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
        with doing(f"{self.row.kind} by {self.row.name} on {image.shape[1]}x{image.shape[0]}"), _blamed_on(self.row):
            made = self.function(image, self.options, *second, *self.weights, **(self.where or {}))
        map_, found = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
        if self.row.plugin:
            _check(self.row, image, map_, found)
        return map_, found

    def _second(self, place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
        """The other picture; what is transparent in it is black."""
        import numpy as np
        from controlnet.preprocessors.images import read_bytes, read_image, read_rgba

        path = getattr(self.options, self.row.beside)
        if not path:
            return None
        data = read_bytes(path)
        picture, rgba = read_image(data, path)[0], read_rgba(data)
        if rgba is not None:
            picture = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255)).astype(np.uint8)
        return place(picture)


@contextmanager
def _blamed_on(row: Detector) -> Iterator[None]:
    """What a plug-in's detector raises is told with its name; of our own it is a bug."""
    try:
        yield
    except ControlNetError:
        raise
    except (Exception, SystemExit) as error:
        if not row.plugin:
            raise
        raise ModelError(
            f"{row.title} of {row.plugin} fails: {reason(error)}", f"pip uninstall {row.plugin}"
        ) from error


def _check(row: Detector, image: np.ndarray, map_: Any, found: Any) -> None:
    """Raises ModelError unless a plug-in's detector returns what `registry` says."""
    import numpy as np
    from controlnet.preprocessors.jsons import dumps
    from controlnet.preprocessors.stage_one import MAKING

    told = f"{getattr(map_, 'dtype', type(map_).__name__)} {getattr(map_, 'shape', '')}"
    shapes = [image.shape[:2], (*image.shape[:2], 3), (*image.shape[:2], 4)]
    right = (
        isinstance(map_, np.ndarray)
        and map_.shape in shapes
        and (map_.dtype == np.uint8 or (map_.dtype == np.uint16 and map_.ndim == 2))
    )
    wrong = None if right else f"a map {told.strip()}, expected uint8 of {shapes[0]} or with 3 channels"
    if right and (not isinstance(found, dict) or set(found) & set(MAKING)):
        wrong = f"fields {found!r:.60}, expected a dictionary without {', '.join(MAKING)}"
    if right and wrong is None:
        try:
            dumps(found)
        except (TypeError, ValueError) as error:
            wrong = f"fields that are no JSON ({error})"
    if wrong:
        raise ModelError(f"{row.title} of {row.plugin} returns {wrong}", f"pip uninstall {row.plugin}")
