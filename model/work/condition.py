"""`--cond PATH[,key=value...]`: what a condition is and how it acts. Parses only; reads no file."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from controlnet.model.control.modes import WEIGHTINGS
from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.files import exists, is_file
from controlnet.preprocessors.kinds import union_kinds
from controlnet.preprocessors.remote import place
from controlnet.preprocessors.tars import is_member, member_of

if TYPE_CHECKING:
    from controlnet.model.control.strength import Strength

PAINTED, REST = "@mask", "@rest"
"""Regions that mean what a job's mask paints, and what it leaves."""
KEYS = ("detect", "kind", "net", "scale", "start", "end", "weighting", "region")

OWN = "own"
"""The kind of a map of which nothing says what it is, for a ControlNet of one's own."""


@dataclass(frozen=True)
class ConditionFlag:
    """One --cond, parsed. start and end bound the part of the sampling, in [0, 1], in which its ControlNet acts."""

    path: str
    detect: str | None = None
    """Make the map from this photo first, by this kind's default detector."""
    kind: str | None = None
    net: str | None = None
    scale: float | tuple[tuple[float, float], ...] = 1.0
    """A number, or (value, from) pairs: `value` from that part of the sampling on."""
    start: float = 0.0
    end: float = 1.0
    weighting: str | tuple[float, ...] | None = None
    """A name or a number for each connection; None leaves it to --weighting."""
    region: str | None = None
    """A picture: control acts where it is white."""

    def __post_init__(self):
        if not (self.kind or "x").isprintable():
            raise UsageError(f"--cond {self.path}: kind={self.kind!r}, expected a word", "kind=canny")
        if not 0 <= self.start <= self.end <= 1:
            raise UsageError(
                f"--cond {self.path}: start={self.start:g}, end={self.end:g}, expected 0 <= start <= end <= 1",
                "start=0,end=0.6 acts in the first 60 % of the steps",
            )


def parse_condition(text: str) -> ConditionFlag:
    """Read one --cond. Known keys are split off from the right, so a path may hold commas and equal signs.

    Raises UsageError for a key given twice, text where a number is due, an empty value or path, and what looks like a
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
        given[key] = _READERS[key](f"--cond {text}", value) if key in _READERS else value
    if not path:
        raise UsageError(f"--cond {text!r}: no path", "--cond map.canny.png")
    stray = re.fullmatch(r"(.*),([a-z]+)=[^,]*", path)
    if stray and not exists(path) and exists(stray[1].split(",")[0]):
        near = difflib.get_close_matches(stray[2], KEYS, 1)
        raise UsageError(
            f"--cond {text}: unknown key {stray[2]!r}, expected one of {', '.join(KEYS)}", f"{(near or KEYS)[0]}=..."
        )
    return ConditionFlag(path, **given)


def parse_weighting(flag: str, value: str) -> str | tuple[float, ...]:
    """`uniform`, `resolution`, `soft`, or numbers between slashes: one for each connection, the middle's last."""
    if value in WEIGHTINGS:
        return value
    if "/" not in value:
        near = difflib.get_close_matches(value, WEIGHTINGS, 1)
        raise UsageError(
            f"{flag}: weighting {value!r}, expected {', '.join(WEIGHTINGS)} or numbers between slashes",
            f"weighting={(near or WEIGHTINGS)[0]}",
        )
    return tuple(_number(flag, part, "weighting=1/1/.5/...") for part in value.split("/"))


def weighting_text(weighting: str | tuple[float, ...]) -> str:
    """A weighting as text that `parse_weighting` reads."""
    return weighting if isinstance(weighting, str) else "/".join(map(_exact, weighting))


def scale_text(scale: float | tuple[tuple[float, float], ...]) -> str:
    """A scale as text that `parse_scale` reads."""
    return "/".join(f"{_exact(v)}@{_exact(a)}" for v, a in scale) if isinstance(scale, tuple) else _exact(scale)


def _exact(value: float) -> str:
    """The shortest text that is read as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def parse_scale(flag: str, value: str) -> float | tuple[tuple[float, float], ...]:
    """`0.8`, or a schedule `1@0/.2@.6`."""
    hint = "scale=1@0/0.2@0.6 is 1 from the start, 0.2 from 60 % of the sampling on"
    if "@" not in value:
        return _number(flag, value, "scale=1")
    parts = [part.partition("@") for part in value.split("/")]
    pairs = tuple((_number(flag, scale, hint), _number(flag, begin, hint)) for scale, _, begin in parts)
    begins = [begin for _, begin in pairs]
    if not all(0 <= begin <= 1 for begin in begins) or begins != sorted(set(begins)):
        raise UsageError(f"{flag}: scale={value}, expected parts of the sampling from 0 to 1 in rising order", hint)
    return pairs


def check_window(flag: ConditionFlag, strength: Strength, evaluations: int) -> None:
    """Raises UsageError when the window, or the schedule in it, holds none of the evaluations."""
    if strength.acts_in(evaluations):
        return
    raise UsageError(
        f"--cond {flag.path}: acts in none of the {evaluations} evaluations (start={flag.start:g}, end={flag.end:g})",
        f"a window of {1 / evaluations:.2g} or more, such as end={min(1.0, flag.start + 1 / evaluations):.2g};"
        " scale=0 for no control",
    )


def check_kind(flag: ConditionFlag, kind: str, net: str, types: int | None) -> None:
    """Raises UsageError for a kind that is not among the types that a network can tell apart."""
    kinds = union_kinds(types or 0)
    if types is None or kind in kinds:
        return
    if kind == OWN:
        raise UsageError(
            f"--cond {flag.path}: which kind is it? {net} knows {', '.join(kinds)}", f"kind={kinds[0]}, ..."
        )
    near = difflib.get_close_matches(kind, kinds, 1)
    raise UsageError(
        f"--cond {flag.path}: kind {kind!r} is not one of those that {net} knows: {', '.join(kinds)}",
        f"kind={near[0]}" if near else f"a net for {kind} alone: net=...",
    )


def check_weighting(flag: ConditionFlag, weighting: str | tuple[float, ...], connections: int) -> None:
    """Raises UsageError when a weighting by numbers does not fit a network of so many connections."""
    if not isinstance(weighting, str) and len(weighting) != connections:
        raise UsageError(
            f"--cond {flag.path}: weighting has {len(weighting)} weights, expected {connections}: one for each"
            f" of the {connections - 1} skip connections, then the middle's",
            "weighting=" + "/".join(["1"] * connections),
        )


def _number(flag: str, value: str, hint: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"{flag}: {value!r}, expected a number", hint) from None
    if not math.isfinite(number):
        raise UsageError(f"{flag}: {value}, expected a finite number", hint)
    return number


_READERS = {
    "scale": parse_scale,
    "start": lambda flag, value: _number(flag, value, "start=0"),
    "end": lambda flag, value: _number(flag, value, "end=1"),
    "weighting": parse_weighting,
}


def found_now(path: str, image: str | Path, command: str) -> str:
    """Where a condition that an image's record names is now. Raises InputError with the way to name another one to
    `command`, score or replay, where it is nowhere."""
    hint = f"controlnet {command} {quote(str(image))} --cond PATH"
    if path == "-":
        raise InputError(f"{image}: its condition came from standard input", hint)
    path = where_now(path, image)
    if not (exists(path) or is_member(path)):
        raise InputError(f"{path}: no such file, a condition of {image}", hint)
    return path


def where_now(path: str, image: str | Path) -> str:
    """A file that an image's record names: where it was, or beside the image if it lies there now."""
    beside = place(str(image)).parent / Path(member_of(path)).name
    return str(beside) if not (is_file(path) or is_member(path)) and is_file(beside) else path
