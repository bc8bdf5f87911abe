"""Training data as people have it: folders of photos or of pairs, recognised by their files.

    photos          pictures; captions in .txt or .caption files beside them, or in metadata.jsonl / .csv / .parquet
    imagefolder     metadata with a `conditioning_image` column (datasets' imagefolder)
    prompt.json     JSON lines with source (the condition), target (the picture), prompt
    webdataset      tar files with samples of equal names up to the first dot
    images          `images/` and `conditions/` (or `conditioning_images/`) with equal names

Folders named for a split (`train/`, `validation/`, `test/`, ...) hold one of these forms each; all but the training
folders are held out. Any other folder with pairs in it is named in an error, never taken for photos.

Reads names and metadata only; the only pictures opened here are the first conditions, whose text may name their kind.
Files that this toolkit wrote do not count as photos: folders of runs and of built data sets, maps beside their photos
(`photo.canny.png`), sheets of `dataset check`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote

from controlnet.preprocessors.data.forms import HELD_OUT, TRAINING, is_data, read_form
from controlnet.preprocessors.data.pair import Pair, Pairs, Source
from controlnet.preprocessors.data.walk import SHEET_SUFFIX, folders_in
from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.files import is_dir
from controlnet.preprocessors.images import read_image
from controlnet.preprocessors.metadata import kind_of

__all__ = ["SHEET_SUFFIX", "Pair", "Pairs", "find_pairs", "kind_of_pairs"]


def find_pairs(folder: Path) -> Pairs:
    """Recognise the data in a folder. Raises InputError for a folder that is missing, empty or of no known form, for
    one whose data lies in a folder below, and for captions that are not UTF-8."""
    folder = Path(folder)
    if not is_dir(folder):
        raise InputError(f"{folder}: no such folder", f"ls {quote(str(folder.absolute().parent))}")
    splits = {name.lower(): folder / name for name in folders_in(folder) if name.lower() in TRAINING + HELD_OUT}
    found = None
    if is_data(folder) or not any(name in TRAINING for name in splits):
        found = read_form(folder, tuple(path for path in splits.values() if is_data(path)))
    parts = [_part(path, name in HELD_OUT) for name, path in splits.items() if is_data(path) or found is None]
    found = _joined(folder, [part for part in (found, *parts) if part is not None])
    if not found.pairs:
        raise InputError(
            f"{folder}: no {'pairs' if found.missing or found.extra else 'pictures'} found"
            + (f"; missing: {found.missing[0]}" if found.missing else "")
            + (f"; skipped: {found.skipped[0]}" if found.skipped else ""),
            "photos with .txt captions, images/ and conditions/, metadata.jsonl or prompt.json; docs/train.md says how",
        )
    return found


def _part(folder: Path, held_out: bool) -> Pairs:
    """The data in a split's folder, with every pair marked as held out or not."""
    found = read_form(folder, ())
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


def kind_of_pairs(found: Source, given: str = "") -> tuple[str, str]:
    """(kind, how it is known). Photos get canny. Raises UsageError when the conditions name no kind, or several."""
    if given:
        return given, "as given"
    if found.pairs[0].condition is None:
        return "canny", "made from the photos by our detector"
    if kind := found.manifest.get("kind"):
        return str(kind), "from the manifest"
    kinds = set()
    for pair in found.pairs[:8]:
        if pair.condition is None:  # of a stream, which leaves it out
            continue
        for map_ in pair.maps or (pair.condition,):
            try:
                kinds.add(kind_of(map_.name, read_image(pair.read(map_), str(map_))[1]))
            except UsageError:
                kinds.add("")
    if len(kinds) == 1 and (kind := kinds.pop()):
        return kind, "from the conditions' text or names"
    if len(kinds) > 1:
        raise UsageError(f"{found.folder}: conditions of several kinds: {', '.join(sorted(kinds))}", "--kind canny")
    raise UsageError(
        f"{found.folder}: the conditions do not tell their kind", "--kind canny, or any word for your own kind"
    )
