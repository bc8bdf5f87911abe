"""Training data as people have it: folders of photos or of pairs, recognised by looking.

    photos          pictures, captions in .txt files beside them or in metadata.jsonl / metadata.csv
    imagefolder     metadata with a `conditioning_image` column (datasets' imagefolder)
    prompt.json     JSON lines with source (the condition), target (the picture), prompt
    images          `images/` and `conditions/` with equal names

Looks at names and metadata only; no picture is opened here but the first conditions, for the kind that their text
tells. What this toolkit writes itself is no photo: folders of runs and of built data sets, maps beside their photos
(`photo.canny.png`), sheets of `dataset check`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.images import SUFFIXES
from controlnet.preprocessors.metadata import kind_of
from controlnet.preprocessors.registry import DETECTORS

CONDITION_COLUMNS = ("conditioning_image", "conditioning_image_file_name", "conditioning_image_path")
CAPTION_COLUMNS = ("text", "prompt", "caption")
OWN_FILES = ("run.json", "manifest.json")
"""They mark a folder that this toolkit has written: a training run, a built data set."""
SHEET_SUFFIX = "-check.png"


@dataclass(frozen=True)
class Pair:
    """A picture, its condition (None: to be made from the picture) and its caption ("" for none)."""

    image: Path
    condition: Path | None
    caption: str
    held_out: bool | None = None
    """Whether the data's own split keeps it from training; None where there is no split."""


@dataclass(frozen=True)
class Pairs:
    """What was found in a folder. `missing` names what is announced and not there, `extra` what has no partner."""

    folder: Path
    form: str
    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    manifest: dict = field(default_factory=dict)


def find_pairs(folder: Path) -> Pairs:
    """Recognise the data in a folder. Raises InputError for a folder that is missing, empty or of no known form, and
    for captions that are not UTF-8."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", f"ls {folder.absolute().parent}")
    metadata = next((folder / n for n in ("metadata.jsonl", "metadata.csv") if (folder / n).is_file()), None)
    rows = _rows(metadata) if metadata else []
    if (folder / "prompt.json").is_file():
        found = _from_rows(folder, "prompt.json", _json_lines(folder / "prompt.json"), "target", ("source",))
    elif rows and any(column in rows[0] for column in CONDITION_COLUMNS):
        found = _from_rows(folder, "imagefolder", rows, "file_name", CONDITION_COLUMNS)
    elif (folder / "images").is_dir() and (folder / "conditions").is_dir():
        found = _from_names(folder)
    else:
        found = _photos(folder, rows)
    if not found.pairs:
        raise InputError(
            f"{folder}: no {'pairs' if found.missing or found.extra else 'pictures'} found"
            + (f"; missing: {found.missing[0]}" if found.missing else ""),
            "photos with .txt captions, images/ and conditions/, metadata.jsonl or prompt.json; see the README",
        )
    return found


def kind_of_pairs(found: Pairs, given: str = "") -> tuple[str, str]:
    """(kind, how it is known). Photos get canny. Raises UsageError when the conditions do not tell, or tell two."""
    if given:
        return given, "as given"
    if found.pairs[0].condition is None:
        return "canny", "made from the photos by our detector"
    if kind := found.manifest.get("kind"):
        return str(kind), "told by the manifest"
    kinds = set()
    for pair in found.pairs[:8]:
        assert pair.condition is not None
        try:
            kinds.add(kind_of(pair.condition.name, _png_text(pair.condition)))
        except UsageError:
            kinds.add("")
    if len(kinds) == 1 and (kind := kinds.pop()):
        return kind, "told by the conditions' text or names"
    if len(kinds) > 1:
        raise UsageError(f"{found.folder}: conditions of several kinds: {', '.join(sorted(kinds))}", "--kind canny")
    raise UsageError(
        f"{found.folder}: the conditions do not tell their kind", "--kind canny, or any word for your own kind"
    )


def _png_text(path: Path) -> dict[str, str]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return {k: v for k, v in getattr(image, "text", {}).items() if isinstance(v, str)}
    except OSError:
        return {}


def _pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, without those that this toolkit wrote."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            f for f in folders
            if not f.startswith(".") and not any((Path(place) / f / own).is_file() for own in OWN_FILES)
        ]  # fmt: skip
        found += [Path(place) / name for name in names if Path(name).suffix.lower() in SUFFIXES and name[0] != "."]
    return sorted(p for p in found if not _is_own(p))


def _is_own(path: Path) -> bool:
    """Whether a picture is a map that lies beside its photo, or a sheet of `dataset check`."""
    stem, _, kind = path.stem.rpartition(".")
    if kind in DETECTORS and any((path.parent / f"{stem}{suffix}").is_file() for suffix in SUFFIXES):
        return True
    return path.name.endswith(SHEET_SUFFIX)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {error.start})", f"iconv -f latin1 -t utf-8 {path} > t && mv t {path}"
        ) from error


def _json_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # splitlines would cut at U+2028 inside a caption
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is not a JSON object")
            rows.append(row)
    return rows


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        rows = _json_lines(path)
    else:
        rows = list(csv.DictReader(io.StringIO(_read_text(path), newline="")))
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise InputError(f"{path}: row {number} has no file_name")
    return rows


def _caption(row: dict) -> str:
    return next((str(row[c]) for c in CAPTION_COLUMNS if row.get(c)), "")


def _from_rows(folder: Path, form: str, rows: list[dict], image: str, conditions: tuple[str, ...]) -> Pairs:
    pairs, missing, named = [], [], set()
    for row in rows:
        condition = next((row[c] for c in conditions if row.get(c)), None)
        names = [row.get(image), condition]
        absent = [str(n) for n in names if not isinstance(n, str) or not n or not (folder / n).is_file()]
        if absent:
            missing += absent
            continue
        paths = [folder / str(n) for n in names]
        named |= {p.resolve() for p in paths}
        held_out = row["split"] != "train" if "split" in row else None
        pairs.append(Pair(paths[0], paths[1], _caption(row), held_out))
    extra = [str(p.relative_to(folder)) for p in _pictures(folder) if p.resolve() not in named]
    return Pairs(folder, form, tuple(pairs), tuple(missing), tuple(extra), _manifest(folder))


def _manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not valid JSON ({error})", "controlnet dataset build makes it again, from the photos"
        ) from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: not a JSON object")
    return manifest


def _from_names(folder: Path) -> Pairs:
    images = {p.relative_to(folder / "images").with_suffix(""): p for p in _pictures(folder / "images")}
    conditions = {p.relative_to(folder / "conditions").with_suffix(""): p for p in _pictures(folder / "conditions")}
    both = sorted(images.keys() & conditions.keys())
    pairs = tuple(Pair(images[n], conditions[n], _caption_beside(images[n])) for n in both)
    missing = tuple(f"conditions/{n}" for n in sorted(images.keys() - conditions.keys()))
    extra = tuple(f"conditions/{n}" for n in sorted(conditions.keys() - images.keys()))
    return Pairs(folder, "images", pairs, missing, extra)


def _photos(folder: Path, rows: list[dict]) -> Pairs:
    captions = {str(row["file_name"]): _caption(row) for row in rows}
    found = {str(p.relative_to(folder)): p for p in _pictures(folder)}
    pairs = tuple(Pair(p, None, captions.get(name) or _caption_beside(p)) for name, p in found.items())
    return Pairs(folder, "photos", pairs, tuple(sorted(captions.keys() - found.keys())))


def _caption_beside(image: Path) -> str:
    text = image.with_suffix(".txt")
    return " ".join(_read_text(text).split()) if text.is_file() else ""
