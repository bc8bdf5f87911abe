"""The detectors: one row each. Nothing is imported until a detector is used.

To add one: a file here with a frozen options dataclass and a function `(image (H, W, 3) uint8 RGB, options) -> map` of
the same height and width, (H, W) or (H, W, 3) uint8; then a row below. Its flags and help follow from the dataclass. A
learned detector also has a row in weights.py, and its function gets the folder of these weights as a third argument. A
function that finds more than the map returns (map, fields for its PNG text).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.log import doing

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Detector:
    """One way of making a kind of condition from a photo."""

    kind: str
    name: str
    function: str
    """`module:function` of this package, imported when used."""
    options: str
    """`module:dataclass`."""
    help: str
    weights: str = ""
    """The name of its weights, in weights.py."""

    def load_options(self) -> type:
        return _resolve(self.options)

    def ready(
        self, options: Any, weights: Path | None = None, offline: bool = False, on_bytes=lambda done, of: None
    ) -> Ready:
        """This detector with these options. Weights come from the folder `weights`, else from the cache, else they are
        fetched. Raises ModelError when they are not available."""
        from controlnet.preprocessors.weights import find  # here: it imports code that uses the network

        more = (find(self.weights, weights, offline, on_bytes),) if self.weights else ()
        return Ready(self, options, _resolve(self.function), more)


@dataclass(frozen=True)
class Ready:
    """A detector with its options and weights, ready to look at photos."""

    row: Detector
    options: Any
    function: Callable
    weights: tuple[Path, ...] = ()

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, dict]:
        """A photo (H, W, 3) uint8 RGB -> its map, of the same height and width, and what else was found on it."""
        with doing(f"{self.row.kind} by {self.row.name} on {image.shape[1]}x{image.shape[0]}"):
            made = self.function(image, self.options, *self.weights)
        return made if isinstance(made, tuple) else (made, {})


def _resolve(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


_ROWS = (
    Detector(
        "canny", "opencv", "canny:canny", "canny:CannyOptions",
        "Edges by brightness steps: thin white lines on black.",
    ),
    Detector(
        "pose", "blazepose", "pose:blazepose", "pose:PoseOptions",
        "People as coloured skeletons of 18 joints, as OpenPose draws them.", "blazepose",
    ),
    Detector(
        "pose", "openpose", "controlnet_aux:openpose",
        "controlnet_aux:OpenposeOptions",
        "OpenPose, by controlnet-aux.", "openpose",
    ),
    *(
        Detector(kind, name, f"depth:{function}_{kind}", f"depth:{kind.title()}Options", help_ + more, name)
        for kind, help_ in (("depth", "Distance: near is white."), ("normal", "Which way surfaces face, from depth."))
        for name, function, more in (
            ("tiny-depth", "tiny", " A rough guess; the other detectors are good."),
            ("depth-anything-v2-small", "transformer", ""), ("midas", "midas", ""), ("zoe", "transformer", ""),
        )
    ),
    Detector(
        "softedge", "hed", "hed:softedge", "hed:SoftEdgeOptions",
        "Edges of things as soft white lines on black.", "hed",
    ),
    Detector(
        "softedge", "pidinet", "controlnet_aux:pidinet",
        "hed:SoftEdgeOptions", "PiDiNet, by controlnet-aux.", "pidinet",
    ),
    Detector(
        "scribble", "hed", "hed:scribble", "hed:ScribbleOptions",
        "The main edges as thick strokes, as if drawn by hand.", "hed",
    ),
    Detector(
        "lineart", "standard", "lineart:lineart",
        "lineart:LineArtOptions", "What is darker than its surroundings, as lines.",
    ),
)  # fmt: skip


def _table(rows: tuple[Detector, ...]) -> dict[str, dict[str, Detector]]:
    table: dict[str, dict[str, Detector]] = {}
    for row in rows:
        if row.name in table.setdefault(row.kind, {}):
            raise ValueError(f"two detectors {row.kind}/{row.name}")
        table[row.kind][row.name] = row
    return table


DETECTORS = _table(_ROWS)
"""kind -> name -> detector; a kind's first one is its default."""


def find_detector(kind: str, name: str | None = None) -> Detector:
    """The detector of a kind with this name, by default the kind's first. Raises UsageError for a kind or name that is
    not in the table."""
    if kind not in DETECTORS:
        near = difflib.get_close_matches(kind, DETECTORS, 1) or list(DETECTORS)
        raise UsageError(
            f"unknown kind {kind!r}: expected one of {', '.join(DETECTORS)}", f"controlnet detect {near[0]} PHOTO"
        )
    choices = DETECTORS[kind]
    if name is None:
        return next(iter(choices.values()))
    if name not in choices:
        raise UsageError(
            f"unknown detector {name!r} for {kind}: expected one of {', '.join(choices)}",
            f"controlnet detect {kind} PHOTO --detector {next(iter(choices))}",
        )
    return choices[name]
