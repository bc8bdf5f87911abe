"""The text that our PNG files carry: what made a map, and all that makes an image again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from controlnet.preprocessors.errors import UsageError

KEY = "controlnet"
"""Name of the PNG text chunk; its value is one JSON object."""
KINDS = ("canny", "pose", "depth", "normal", "softedge", "scribble", "lineart", "mlsd", "seg")
"""Kinds of condition that a file's name may tell."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dump(fields: dict) -> dict[str, str]:
    """PNG text holding `fields`."""
    return {KEY: json.dumps(fields, ensure_ascii=False, sort_keys=True)}


def load(text: dict[str, str]) -> dict:
    """Our fields of a picture's text; empty where there are none or they are not ours."""
    try:
        fields = json.loads(text.get(KEY, "{}"))
    except json.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def kind_of(name: str, text: dict[str, str], given: str | None = None) -> str:
    """The kind of a condition: as given, else from its PNG text, else from its name (`*.KIND.png`, `*_KIND.png`,
    `KIND.png`). Raises UsageError listing the choices."""
    if given:
        return given
    if kind := load(text).get("kind"):
        return str(kind)
    match = re.search(rf"(?:^|[._])({'|'.join(KINDS)})$", Path(name).stem)
    if match:
        return match[1]
    raise UsageError(
        f"{name}: its kind is told neither by its text nor by its name; expected one of {', '.join(KINDS)}",
        f"--cond {name},kind=canny",
    )
