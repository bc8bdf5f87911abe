"""`--cond PATH[,key=value...]`: what a condition is and how it acts. Parses only; reads no file."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.preprocessors.errors import UsageError

KEYS = ("detect", "kind", "net", "scale", "start", "end")


@dataclass(frozen=True)
class ConditionFlag:
    """One --cond, parsed. start and end bound the part of the sampling, in [0, 1], in which its ControlNet acts."""

    path: str
    detect: str | None = None
    """Make the map from this photo first, by this kind's default detector."""
    kind: str | None = None
    net: str | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise UsageError(f"--cond {self.path}: scale {self.scale}, expected a finite number", "scale=1")
        if not 0 <= self.start <= self.end <= 1:
            raise UsageError(
                f"--cond {self.path}: start={self.start:g}, end={self.end:g}, expected 0 <= start <= end <= 1",
                "start=0,end=0.6 acts in the first 60 % of the steps",
            )


def parse_condition(text: str) -> ConditionFlag:
    """Known keys are split off from the right, so commas and equal signs in paths survive.

    Raises UsageError for a key given twice, a number that is none, an empty value or path, and what looks like a
    mistyped key after an existing file.
    """
    path: str = text
    given: dict[str, Any] = {}
    while match := re.fullmatch(rf"(.*),({'|'.join(KEYS)})=([^,]*)", path, re.DOTALL):
        path, key, value = match.groups()
        if key in given:
            raise UsageError(f"--cond {text}: {key} is given twice")
        if not value:
            raise UsageError(f"--cond {text}: {key} has no value", f"{key}=...")
        given[key] = _number(text, key, value) if key in ("scale", "start", "end") else value
    if not path:
        raise UsageError(f"--cond {text!r}: no path", "--cond map.canny.png")
    stray = re.fullmatch(r"(.*),([a-z]+)=[^,]*", path)
    if stray and not Path(path).exists() and Path(stray[1].split(",")[0]).exists():
        near = difflib.get_close_matches(stray[2], KEYS, 1)
        raise UsageError(
            f"--cond {text}: unknown key {stray[2]!r}, expected one of {', '.join(KEYS)}", f"{(near or KEYS)[0]}=..."
        )
    return ConditionFlag(path, **given)


def _number(text: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"--cond {text}: {key}={value}, expected a number", f"{key}=1") from None
