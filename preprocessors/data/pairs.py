"""Training data as people have it: folders of photos or of pairs, recognised by looking.

    photos          pictures; captions in .txt or .caption files beside them, or in metadata.jsonl / .csv / .parquet
    imagefolder     metadata with a `conditioning_image` column (datasets' imagefolder)
    prompt.json     JSON lines with source (the condition), target (the picture), prompt
    images          `images/` and `conditions/` (or `conditioning_images/`) with equal names

Folders named for a split (`train/`, `validation/`, `test/`, ...) hold one of these forms each; all but the training
folders are held out. Any other folder with pairs in it is named in an error, never taken for photos.

Looks at names and metadata only; no picture is opened here but the first conditions, for the kind that their text
tells. What this toolkit writes itself is no photo: folders of runs and of built data sets, maps beside their photos
(`photo.canny.png`), sheets of `dataset check`.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

from controlnet.preprocessors.detectors.registry import DETECTORS
from controlnet.preprocessors.errors import InputError, UsageError, reason
from controlnet.preprocessors.files import is_dir, is_file, read_text
from controlnet.preprocessors.images import suffixes, why_skipped
from controlnet.preprocessors.jsons import read_object
from controlnet.preprocessors.metadata import kind_of, text_of

CONDITION_COLUMNS = ("conditioning_image", "conditioning_image_file_name", "conditioning_image_path")
CAPTION_COLUMNS = ("text", "prompt", "caption")
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CONDITION_FOLDERS = ("conditions", "conditioning_images")
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "test", "testing", "dev", "eval", "held_out")
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
    """What was found in a folder. `missing` names what is announced and not there, `extra` what has no partner,
    `skipped` what looks like data and is not used, each with the reason."""

    folder: Path
    form: str
    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    manifest: dict = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def find_pairs(folder: Path) -> Pairs:
    """Recognise the data in a folder. Raises InputError for a folder that is missing, empty or of no known form, for
    one that holds its data in a folder below, and for captions that are not UTF-8."""
    folder = Path(folder)
    if not is_dir(folder):
        raise InputError(f"{folder}: no such folder", f"ls {quote(str(folder.absolute().parent))}")
    splits = {name.lower(): folder / name for name in _folders_in(folder) if name.lower() in TRAINING + HELD_OUT}
    found = None
    if _form_of(folder) or not any(name in TRAINING for name in splits):
        found = _from_folder(folder, splits)
    parts = [_part(path, name in HELD_OUT) for name, path in splits.items() if _form_of(path) or found is None]
    found = _joined(folder, [part for part in (found, *parts) if part is not None])
    if not found.pairs:
        raise InputError(
            f"{folder}: no {'pairs' if found.missing or found.extra else 'pictures'} found"
            + (f"; missing: {found.missing[0]}" if found.missing else "")
            + (f"; skipped: {found.skipped[0]}" if found.skipped else ""),
            "photos with .txt captions, images/ and conditions/, metadata.jsonl or prompt.json; see the README",
        )
    return found


def _form_of(folder: Path) -> str:
    """The form whose files a folder has; "" for one of photos without metadata."""
    if is_file(folder / "prompt.json"):
        return "prompt.json"
    if _metadata_of(folder):
        return "metadata"
    if is_dir(folder / "images") and _condition_folder(folder):
        return "images"
    return ""


def _metadata_of(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if is_file(folder / name)), None)


def _condition_folder(folder: Path) -> Path | None:
    return next((folder / name for name in CONDITION_FOLDERS if is_dir(folder / name)), None)


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})", f"ls -ld {quote(str(folder))}") from error


def _from_folder(folder: Path, splits: dict[str, Path]) -> Pairs:
    """The data of one folder, without what its folders for a split hold in a form of their own."""
    form = _form_of(folder)
    metadata = _metadata_of(folder)
    rows = _rows(metadata) if metadata else []
    inside = tuple(path for path in splits.values() if _form_of(path))
    if form == "prompt.json":
        return _from_rows(folder, form, _json_lines(folder / form), "target", ("source",), inside)
    if rows and any(column in rows[0] for column in CONDITION_COLUMNS):
        return _from_rows(folder, "imagefolder", rows, "file_name", CONDITION_COLUMNS, inside)
    if conditions := _condition_folder(folder) if is_dir(folder / "images") else None:
        return _from_names(folder, conditions)
    return _photos(folder, rows, inside)


def _part(folder: Path, held_out: bool) -> Pairs:
    """The data of a folder for a split."""
    found = _from_folder(folder, {})
    pairs = tuple(replace(pair, held_out=held_out) for pair in found.pairs)
    return replace(found, pairs=pairs)


def _joined(folder: Path, parts: list[Pairs]) -> Pairs:
    """The data of several folders as one. Raises InputError when some are pairs and some are photos."""
    if len({part.pairs[0].condition is None for part in parts if part.pairs}) > 1:
        forms = ", ".join(f"{part.folder} ({part.form})" for part in parts)
        raise InputError(f"{folder}: photos and pairs together: {forms}", "a folder of its own for each")
    if len(parts) == 1:
        return replace(parts[0], folder=folder)
    below = [f"{part.folder.relative_to(folder)}/" if part.folder != folder else "" for part in parts]
    named = {
        name: tuple(f"{at}{text}" for at, part in zip(below, parts, strict=True) for text in getattr(part, name))
        for name in ("missing", "extra", "skipped")
    }
    pairs = tuple(pair for part in parts for pair in part.pairs)
    return Pairs(folder, parts[0].form, pairs, manifest=parts[0].manifest, **named)


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
            kinds.add(kind_of(pair.condition.name, text_of(pair.condition)))
        except UsageError:
            kinds.add("")
    if len(kinds) == 1 and (kind := kinds.pop()):
        return kind, "told by the conditions' text or names"
    if len(kinds) > 1:
        raise UsageError(f"{found.folder}: conditions of several kinds: {', '.join(sorted(kinds))}", "--kind canny")
    raise UsageError(
        f"{found.folder}: the conditions do not tell their kind", "--kind canny, or any word for your own kind"
    )


@dataclass
class _Below:
    """What a walk through a folder sees."""

    pictures: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    """Folders below that hold data in a form of their own."""


def _look(folder: Path, leave: tuple[Path, ...] = ()) -> _Below:
    """All pictures below a folder, without those that this toolkit wrote, and without the folders to `leave`."""
    seen = _Below()
    for place, names in _walk(folder, leave):
        if place != folder and _form_of(place):
            seen.data.append(place)
        for name in names:
            path = place / name
            if path.suffix.lower() in suffixes():
                if not _is_own(path):
                    seen.pictures.append(path)
            elif why := why_skipped(path):
                seen.skipped.append(f"{path.relative_to(folder)} ({why})")
    seen.pictures.sort()
    return seen


def _walk(folder: Path, leave: tuple[Path, ...]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its files) of a folder and all below it, each once also where links go round in circles."""
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        try:
            stat = Path(place).stat()
        except OSError:
            folders.clear()
            continue
        if (stat.st_dev, stat.st_ino) in visited:
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(place, f) not in leave
                            and not any(is_file(Path(place, f, own)) for own in OWN_FILES))  # fmt: skip
        yield Path(place), [name for name in names if name[0] != "."]


def _is_own(path: Path) -> bool:
    """Whether a picture is a map that lies beside its photo, or a sheet of `dataset check`."""
    stem, _, kind = path.stem.rpartition(".")
    if kind in DETECTORS and any(is_file(path.parent / f"{stem}{suffix}") for suffix in suffixes()):
        return True
    return path.name.endswith(SHEET_SUFFIX)


def _json_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would cut at U+2028 inside a caption
        if line.strip():
            rows.append(read_object(line, f"{path} line {number}"))
    return rows


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        rows = _json_lines(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        except csv.Error as error:
            raise InputError(f"{path}: not CSV ({error})") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise InputError(f"{path}: row {number} has no file_name")
    return rows


def _parquet_rows(path: Path) -> list[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading it needs pyarrow", "pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({reason(error)})") from error


def _caption(row: dict, where: str) -> str:
    caption = next((str(row[c]) for c in CAPTION_COLUMNS if row.get(c)), "")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a caption with half a character in it (position {error.start})") from error
    return caption


def _from_rows(
    folder: Path, form: str, rows: list[dict], image: str, conditions: tuple[str, ...], leave: tuple[Path, ...]
) -> Pairs:
    pairs, missing, named = [], [], set()
    for number, row in enumerate(rows, 1):
        condition = next((row[c] for c in conditions if row.get(c)), None)
        names = [row.get(image), condition]
        for name in names:
            if isinstance(name, (list, tuple)) and len(name) > 1:
                raise InputError(
                    f"{folder}: row {number} has {len(name)} conditions, {', '.join(map(str, name))}; expected one",
                    "a row for each, or a ControlNet for each kind",
                )
        absent = [str(n) for n in names if not isinstance(n, str) or not n or not is_file(folder / n)]
        if absent:
            missing += absent
            continue
        paths = [folder / str(n) for n in names]
        named |= {p.resolve() for p in paths}
        held_out = row["split"] != "train" if "split" in row else None
        pairs.append(Pair(paths[0], paths[1], _caption(row, f"{folder}: row {number}"), held_out))
    seen = _look(folder, leave)
    extra = [str(p.relative_to(folder)) for p in seen.pictures if p.resolve() not in named]
    return Pairs(folder, form, tuple(pairs), tuple(missing), tuple(extra), _manifest(folder), tuple(seen.skipped))


def _manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not is_file(path):
        return {}
    return read_object(read_text(path), str(path), hint="controlnet dataset build makes it again, from the photos")


def _from_names(folder: Path, beside: Path) -> Pairs:
    places = folder / "images", beside
    seen = [_look(place) for place in places]
    images, conditions = (
        {picture.relative_to(place).with_suffix(""): picture for picture in below.pictures}
        for place, below in zip(places, seen, strict=True)
    )
    both = sorted(images.keys() & conditions.keys())
    pairs = tuple(Pair(images[n], conditions[n], _caption_beside(images[n]), _split_of(n)) for n in both)
    missing = tuple(f"{beside.name}/{n}" for n in sorted(images.keys() - conditions.keys()))
    extra = tuple(f"{beside.name}/{n}" for n in sorted(conditions.keys() - images.keys()))
    skipped = tuple(text for below in seen for text in below.skipped)
    return Pairs(folder, "images", pairs, missing, extra, {}, skipped)


def _photos(folder: Path, rows: list[dict], leave: tuple[Path, ...]) -> Pairs:
    seen = _look(folder, leave)
    if seen.data and not rows:
        first, more = seen.data[0], f" and {len(seen.data) - 1} more" if len(seen.data) > 1 else ""
        raise InputError(
            f"{folder}: the data lies in {first}{more}, not in this folder itself",
            f"give that folder: {quote(str(first))}",
        )
    captions = {str(row["file_name"]): _caption(row, f"{folder}: row {n}") for n, row in enumerate(rows, 1)}
    found = {str(p.relative_to(folder)): p for p in seen.pictures}
    pairs = tuple(
        Pair(path, None, captions.get(name) or _caption_beside(path), _split_of(path.relative_to(folder)))
        for name, path in found.items()
    )
    unused = [f"{place.relative_to(folder)} (its own metadata is not read)" for place in seen.data]
    missing = tuple(sorted(captions.keys() - found.keys()))
    return Pairs(folder, "photos", pairs, missing, skipped=(*seen.skipped, *unused))


def _split_of(path: Path) -> bool | None:
    """Whether a picture's path, relative to the data, begins with the name of a split that is held out."""
    first = path.parts[0].lower()
    if len(path.parts) > 1 and first in HELD_OUT + TRAINING:
        return first in HELD_OUT
    return None


def _caption_beside(image: Path) -> str:
    texts = [image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    text = next((text for text in texts if is_file(text)), None)
    return " ".join(read_text(text).split()) if text else ""
