"""A folder of results as a page: every image with its map, its photo, and where it keeps to its condition."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from controlnet.model.report.page import as_data
from controlnet.model.work.condition import where_now
from controlnet.model.work.outputs import IMAGES
from controlnet.model.work.score import MEASURES, Scored, Scorer
from controlnet.preprocessors.errors import ControlNetError, InputError
from controlnet.preprocessors.images import read_bytes, read_image
from controlnet.preprocessors.kinds import kind_named
from controlnet.preprocessors.metadata import load

SIDES = ((100, 512), (400, 384), (10**9, 256))
"""Up to so many images, pictures of so many pixels: a page of a thousand must stay quick."""
SETTINGS = ("base", "seed", "steps", "scheduler", "guidance", "size", "negative", "lora", "strength", "init", "mask")


def results_in(folder: Path) -> list[Path]:
    """The images below a folder that carry a record of `generate`, by name. Raises InputError if there are none."""
    pictures = (path for path in sorted(folder.rglob("*"), key=_in_order) if path.suffix.lower() in IMAGES)
    found = [path for path in pictures if "prompt" in _record(path)]
    if not found:
        raise InputError(
            f"{folder}: neither a training run nor images that generate made", "controlnet generate ... -o out/"
        )
    return found


def _in_order(path: Path) -> list[tuple[int, str]]:
    """Numbers in names by their value: out/9-a.png before out/10-a.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def results_page(
    paths: list[Path], page: Path, scorer: Scorer | None, on_item: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """What the page shows of these images; without a scorer no scores. `page` is where it will be."""
    side = next(pixels for most, pixels in SIDES if len(paths) <= most)
    items = []
    for done, path in enumerate(paths, 1):
        items.append(_item(path, page, scorer, side))
        on_item(done)
    kinds = sorted({kind for item in items for kind in item["scores"]})
    return {
        "items": items,
        "kinds": kinds,
        "measures": {kind: MEASURES[kind_named(kind).score or ""].main for kind in kinds},
    }


def _record(path: Path) -> dict[str, Any]:
    try:
        return load(read_image(read_bytes(str(path)), str(path))[1])
    except ControlNetError:
        return {}


def entries_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The conditions of a record; none where it has another shape."""
    entries = record.get("conditions")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _item(path: Path, page: Path, scorer: Scorer | None, side: int) -> dict[str, Any]:
    image, text = read_image(read_bytes(str(path)), str(path))
    record = load(text)
    is_part = record.get("region_only") is True
    views = [{"label": "image", "src": as_data(image, side)}]
    scores: dict[str, dict[str, float]] = {}
    why = []
    for entry in entries_of(record):
        kind = str(entry.get("kind"))
        try:
            scored = None if scorer is None else scorer.of_record(image, str(path), entry, is_part)[1]
        except ControlNetError as error:
            scored = None
            why.append(f"{kind} not scored: {error}")
        views += _views_of(entry, kind, scored, str(path), side)
        if scored is not None:
            alike = sum(name.split(" ")[0] == kind for name in scores)
            label = f"{kind} {alike + 1}" if alike else kind  # of two poses both are shown
            scores[label] = {name: round(value, 4) for name, value in scored.scores.items()}
            scores[label]["main"] = round(scored.main, 4)
    mains = [one["main"] for one in scores.values()]
    return {
        "name": path.name,
        "href": _beside(path, page),
        "size": [image.shape[1], image.shape[0]],
        "prompt": str(record.get("prompt") or ""),
        "views": _unrepeated(views),
        "scores": scores,
        "main": round(float(np.mean(mains)), 4) if mains else None,
        "why": why,
        "facts": _facts(record),
        "command": f"controlnet replay {quote(str(path))} -o {quote(path.stem + '-again.png')}",
    }


def _views_of(entry: dict[str, Any], kind: str, scored: Scored | None, image: str, side: int) -> list[dict[str, str]]:
    """A condition's map, where the image keeps to it, and the photo it was made from; what of them can be had."""
    views = []
    if scored is not None:
        legend = MEASURES[kind_named(kind).score or "lines"].legend
        views.append({"label": f"{kind} map", "src": as_data(scored.condition, side)})
        views.append({"label": f"{kind} kept", "src": as_data(scored.shown, side), "legend": legend})
    try:
        picture, _ = read_image(read_bytes(where_now(str(entry.get("path")), image)), image)
    except ControlNetError:
        return views
    if entry.get("detect"):
        views.append({"label": "photo", "src": as_data(picture, side)})
    elif scored is None:
        views.insert(0, {"label": f"{kind} map", "src": as_data(picture, side)})
    return views


def _unrepeated(views: list[dict[str, str]]) -> list[dict[str, str]]:
    """Two conditions may be made from one photo."""
    return list({(view["label"], view["src"]): view for view in views}.values())


def _facts(record: dict[str, Any]) -> list[list[str]]:
    facts = [[name, _plain(record[name])] for name in SETTINGS if record.get(name) not in (None, "", [])]
    for entry in entries_of(record):
        start, end = entry.get("start"), entry.get("end")
        window = "" if (start, end) == (0, 1) else f", from {start} to {end}"
        facts.append([str(entry.get("kind")), f"{entry.get('net')}, scale {_plain(entry.get('scale'))}{window}"])
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return (" x " if all(isinstance(one, int) for one in value) else ", ").join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _beside(path: Path, page: Path) -> str:
    """The link from the page to an image."""
    target, base = path.resolve(), page.resolve().parent
    return target.relative_to(base).as_posix() if target.is_relative_to(base) else target.as_uri()
