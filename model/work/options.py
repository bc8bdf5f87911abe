"""How a field of a job is read, from the text of its flag or from a JSON value, and where else it appears."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from controlnet.model.work.condition import ConditionFlag, parse_condition, parse_weighting
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.files import exists

MOST_LARGER = 4
MAX_SIDE = 100_000

Read = Callable[[str, Any], Any]
"""(name of the field, text or JSON value) -> its value. Raises UsageError."""


@dataclass(frozen=True)
class Option:
    """How a field of `Job` is read, and where else it appears."""

    read: Read
    type: type = str
    """The type of its flag."""
    flags: tuple[str, ...] = ()
    """Other names of the flag, beside --NAME."""
    metavar: str | None = None
    flag_default: Any = ...
    """The flag's default, if the command determines the field's own."""
    recorded: bool = True
    """Whether its settled value (`Job.settled`) is in an image's record, where `replay` reads it."""
    shared: bool = True
    """Whether images that are sampled together must agree in it."""


def option(default: Any, read: Read, type: type = str, *flags: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(read, type, flags, **more)})


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}: {value!r}, expected text", f'"{name}": "..."')
    return value


def number(name: str, value: Any, reader: Callable[[Any], Any] = float, what: str = "a number") -> Any:
    try:
        if isinstance(value, bool) or (reader is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return reader(value)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"{name}: {value!r}, expected {what}", f"{name}=1") from None


def whole(name: str, value: Any) -> int:
    return number(name, value, int, "a whole number")


def factor(name: str, value: Any) -> float:
    try:
        factor = number(name, str(value).removesuffix("x"))
    except UsageError:
        raise UsageError(f"--{name} {value}: expected a factor such as 2x", f"--{name} 2x") from None
    if not 1 < factor <= MOST_LARGER:
        raise UsageError(f"--{name} {value}: expected a factor above 1 and up to {MOST_LARGER}", f"--{name} 2x")
    return factor


def yes_or_no(name: str, value: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False, "": False}
    if str(value).lower() not in known:
        raise UsageError(f"{name}: {value!r}, expected true or false", f'"{name}": true')
    return known[str(value).lower()]


def size(name: str, value: Any) -> tuple[int, int]:
    from controlnet.preprocessors.geometry import parse_size  # here: it imports the libraries of pictures

    if isinstance(value, (list, tuple)) and len(value) == 2:
        value = f"{value[0]}x{value[1]}"
    return parse_size(str(value))


def told_size(name: str, value: Any) -> tuple[int, int]:
    """A size that is only told to the base, not made: any."""
    texts = value.split("x") if isinstance(value, str) else value
    texts = texts if isinstance(texts, (list, tuple)) else [texts]
    texts = texts * 2 if len(texts) == 1 else texts
    return pair(name, value, texts, "WIDTHxHEIGHT or one number", 1, f"--{name.replace('_', '-')} 1024x1024")


def point(name: str, value: Any) -> tuple[int, int]:
    texts = value.split(",") if isinstance(value, str) else value
    return pair(name, value, texts, "LEFT,TOP, in pixels", 0, f"--{name} 0,0")


def pair(name: str, value: Any, texts: Any, what: str, least: int, hint: str) -> tuple[int, int]:
    """Two whole numbers from `least` to MAX_SIDE."""
    try:
        a, b = (whole(name, text) for text in texts)
        if not (least <= a <= MAX_SIDE and least <= b <= MAX_SIDE):
            raise ValueError
    except (UsageError, ValueError, TypeError):
        raise UsageError(f"--{name.replace('_', '-')} {value}: expected {what}", hint) from None
    return a, b


def conditions(name: str, value: Any) -> tuple[ConditionFlag, ...]:
    texts = [value] if isinstance(value, (str, ConditionFlag)) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, (str, ConditionFlag)) for text in texts):
        raise UsageError(f"{name}: {texts!r}, expected text or a list of texts", f'"{name}": ["map.png,scale=0.8"]')
    return tuple(text if isinstance(text, ConditionFlag) else parse_condition(text) for text in texts)


def texts(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, str) and one for one in values):
        raise UsageError(f"{name}: {value!r}, expected text or a list of texts", f'"{name}": ["FILE"]')
    return tuple(values)


def loras(name: str, value: Any) -> tuple[str, ...]:
    found = texts(name, value)
    for one in found:
        lora_of(one)
    return found


def embeddings(name: str, value: Any) -> tuple[str, ...]:
    found = texts(name, value)
    for one in found:
        embedding_of(one)
    return found


def lora_of(text: str) -> tuple[str, float]:
    """(file, folder or hub id, scale) of `FILE[:scale]`."""
    source, colon, end = text.rpartition(":")
    if not colon or exists(text) or "/" in end or "." in end.lstrip("+-0123456789."):
        return text, 1.0
    try:
        scale = float(end)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and source):
        raise UsageError(
            f"--lora {text}: expected FILE or FILE:scale, a finite number",
            f"--lora {source or 'style.safetensors'}:0.8",
        )
    return source, scale


def embedding_of(text: str) -> tuple[str, str | None]:
    """(file, folder or hub id, word) of `FILE[:word]`."""
    source, colon, word = text.rpartition(":")
    if not colon or exists(text) or "/" in word:
        return text, None
    if not source:
        raise UsageError(f"--embedding {text}: expected FILE or FILE:word", "--embedding toy.safetensors:toy")
    return source, word or None


def weighting(name: str, value: Any) -> str | tuple[float, ...]:
    return value if isinstance(value, tuple) else parse_weighting("--weighting", str(value))
