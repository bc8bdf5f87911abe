"""The text that our pictures carry: how a map was made, and all that is needed to make an image again."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.jsons import dumps, object_or_empty
from controlnet.preprocessors.kinds import KINDS
from controlnet.preprocessors.remote import is_url, read_url
from controlnet.preprocessors.tars import read_member, split

KEY = "controlnet"
"""Name of the PNG text chunk; its value is one JSON object."""


DESCRIPTION, EXIF, COMMENT = 0x010E, 0x8769, 0x9286
"""Tags: ImageDescription, the EXIF part, UserComment in it."""
UNICODE = b"UNICODE\0"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dump(fields: dict) -> dict[str, str]:
    """PNG text holding `fields`."""
    return {KEY: dumps(fields, sort_keys=True)}


def load(text: dict[str, str]) -> dict:
    """Our fields in a picture's text; empty if it has none of ours."""
    return object_or_empty(text.get(KEY, "{}"))


def size_of(path: str) -> tuple[int, int] | None:
    """(width, height) of a picture file, from its header; None for one that cannot be read."""
    from PIL import Image

    try:
        with Image.open(_opened(path)) as image:
            return image.size
    except Exception:  # Pillow raises a dozen types for broken data; decoding it reports the error
        return None


def text_of(path: Path) -> dict[str, str]:
    """The text of a picture file, read from its header; empty for a file that cannot be read."""
    from PIL import Image

    try:
        with Image.open(_opened(str(path))) as image:
            return text_in(image)
    except Exception:  # Pillow raises a dozen types for broken data; decoding it reports the error
        return {}


def text_in(image: Any) -> dict[str, str]:
    """The text that a picture of Pillow carries: of a PNG its chunks, of a JPEG or WebP what `exif_of` wrote."""
    text = {key: value for key, value in getattr(image, "text", {}).items() if isinstance(value, str)}
    if text or image.format not in ("JPEG", "WEBP"):
        return text
    exif = image.getexif()
    record, comment = exif.get(DESCRIPTION), exif.get_ifd(EXIF).get(COMMENT)
    if isinstance(record, str) and record.startswith(f"{KEY}: "):
        text[KEY] = record.removeprefix(f"{KEY}: ")
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        text["parameters"] = comment.removeprefix(UNICODE).decode("utf-16-be", "replace")
    return text


def exif_of(text: dict[str, str]) -> Any:
    """EXIF with our record, in ASCII, as the description, and with `parameters` as the comment, where A1111 has it."""
    from PIL import Image

    exif = Image.Exif()
    if KEY in text:
        exif[DESCRIPTION] = f"{KEY}: {json.dumps(json.loads(text[KEY]))}"
    if "parameters" in text:
        exif.get_ifd(EXIF)[COMMENT] = UNICODE + text["parameters"].encode("utf-16-be")
    return exif


def _opened(path: str) -> str | io.BytesIO:
    """What Pillow opens: a path, or the bytes of a file behind a URL or in a tar file."""
    if inside := split(path):
        return io.BytesIO(read_member(*inside))
    return io.BytesIO(read_url(path)) if is_url(path) else path


def kind_of(name: str, text: dict[str, str], given: str | None = None) -> str:
    """The kind of a condition: as given, else from its PNG text, else from its name (`*.KIND.png`, `*_KIND.png`,
    `KIND.png`). Raises UsageError listing the choices."""
    if given:
        return given
    kind = load(text).get("kind")
    if isinstance(kind, str) and kind and kind.isprintable():
        return kind
    match = re.search(rf"(?:^|[._])({'|'.join(KINDS)})$", Path(name).stem)
    if match:
        return match[1]
    raise UsageError(
        f"{name}: neither its text nor its name says its kind; expected one of {', '.join(KINDS)}",
        f"for a photo: --cond {name},detect=canny; for a map: --cond {name},kind=canny",
    )
