"""The one place where JSON that others wrote is read. JSON that is invalid, nested too deeply or of an unexpected shape
is a user error like any other."""

from __future__ import annotations

import json
from typing import Any

from controlnet.preprocessors.errors import ControlNetError, InputError, reason


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for text that is not JSON, not UTF-8, or nested too deeply to be
    read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(
    text: str | bytes, where: str, error: type[ControlNetError] = InputError, hint: str = ""
) -> dict[str, Any]:
    """A JSON object. `where` names the file, and the line if it has several. Raises `error` for anything else."""
    try:
        value = parse(text)
    except ValueError as broken:
        raise error(f"{where}: not valid JSON ({reason(broken)})", hint) from broken
    if not isinstance(value, dict):
        raise error(f"{where}: {name_of(value)}, expected a JSON object", hint)
    return value


def object_or_empty(text: str | bytes) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else."""
    try:
        value = parse(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def dumps(value: Any, **options: Any) -> str:
    """JSON that can be written as UTF-8: letters stay as they are, unless the strings hold bytes that are not text."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def name_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
