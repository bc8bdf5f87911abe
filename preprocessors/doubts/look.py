"""What a check looks at, and what it may find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from controlnet.preprocessors.kinds import Kind


@dataclass(frozen=True, eq=False)
class Look:
    """A condition as the checks see it."""

    map: np.ndarray
    """(H, W, 3) uint8."""
    kind: Kind
    size: tuple[int, int] | None = None
    """(width, height) of the canvas or picture that it is for."""
    alpha: np.ndarray | None = None
    """(H, W) uint8, of a file with transparency."""
    record: dict[str, Any] = field(default_factory=dict)
    """Its PNG text, if it is ours."""


@dataclass(frozen=True, eq=False)
class Doubt:
    """`what` names the fault in the same words for every map, `text` describes it, `cure` says what to do."""

    what: str
    text: str
    cure: str
    mend: Callable[[], np.ndarray] | None = None
    """The map (H, W, 3) uint8 without the fault, where that needs no photo."""
    certain: bool = True
    """Whether a data set with it is wrong, or worth a look."""
