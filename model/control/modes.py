"""The ways to apply control by name (paper section 3.4 and the released code). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTINGS = ("uniform", "resolution", "soft")
"""Weights of the connections: all 1; by resolution (paper section 3.4); 0.825 ** (n - 1 - i) (the released code)."""
CONTROL_ON = ("both", "cond")
"""The halves of the guidance in which control acts: both, or only the one that reads the prompt."""


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
