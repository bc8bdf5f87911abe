"""The ways to apply control by name (paper section 3.4 and the released code), and the types of unions. Imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTINGS = ("uniform", "resolution", "soft")
"""Weights of the connections: all 1; by resolution (paper section 3.4); 0.825 ** (n - 1 - i) (the released code)."""
CONTROL_ON = ("both", "cond")
"""The halves of the guidance in which control acts: both, or only the one that reads the prompt."""

UNION_TYPES = {
    "pose": 0, "depth": 1, "softedge": 2, "scribble": 2, "canny": 3, "lineart": 3, "lineart_anime": 3, "mlsd": 3,
    "normal": 4, "seg": 5, "tile": 6, "inpaint": 7,
}  # fmt: skip
"""Kind of condition -> its type in a union (`union.py`). Some unions have the first six types only."""


def union_kinds(types: int) -> tuple[str, ...]:
    """The kinds of condition that a union with so many types knows."""
    return tuple(kind for kind, type_ in UNION_TYPES.items() if type_ < types)


@dataclass(frozen=True)
class Mode:
    control_on: str
    weighting: str


MODES = {
    "balanced": Mode("both", "uniform"),
    "prompt": Mode("both", "soft"),
    "control": Mode("cond", "resolution"),
    "guess": Mode("cond", "soft"),
}
