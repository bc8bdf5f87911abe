"""The forms of training data in a folder, one class each: whether a folder has this form, and its pairs.

To add one: a class here, and its place in FORMS. A folder is read in the first form that it has.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Protocol

from controlnet.preprocessors.data.pair import Pair, Pairs
from controlnet.preprocessors.data.rows import caption_of, json_lines, metadata_of, rows_of
from controlnet.preprocessors.data.walk import look
from controlnet.preprocessors.errors import InputError
from controlnet.preprocessors.files import decoded, is_dir, is_file, read_text
from controlnet.preprocessors.images import suffixes
from controlnet.preprocessors.jsons import read_object
from controlnet.preprocessors.tars import members, name_of, read_member

CONDITION_COLUMNS = ("conditioning_image", "conditioning_image_file_name", "conditioning_image_path")
CAPTION_SUFFIXES = (".txt", ".caption")
CONDITION_FOLDERS = ("conditions", "conditioning_images")
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "test", "testing", "dev", "eval", "held_out")


class Form(Protocol):
    """A form of training data."""

    name: str

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has files of this form, by their names."""

    def read(self, folder: Path, leave: tuple[Path, ...]) -> Pairs | None:
        """The pairs; None if the files' content shows another form. `leave` are folders below to skip, since they hold
        data of their own. Raises InputError for data that contradicts itself."""


class PromptJson:
    """JSON lines with source (the condition), target (the picture) and prompt."""

    name = "prompt.json"

    def is_in(self, folder: Path) -> bool:
        return is_file(folder / self.name)

    def read(self, folder: Path, leave: tuple[Path, ...]) -> Pairs:
        return _from_rows(folder, self.name, json_lines(folder / self.name), "target", ("source",), leave)


class ImageFolder:
    """Metadata with a `conditioning_image` column, as in the imagefolder of the `datasets` library."""

    name = "imagefolder"

    def is_in(self, folder: Path) -> bool:
        return metadata_of(folder) is not None

    def read(self, folder: Path, leave: tuple[Path, ...]) -> Pairs | None:
        metadata = metadata_of(folder)
        rows = rows_of(metadata) if metadata else []
        if not rows or not any(column in rows[0] for column in CONDITION_COLUMNS):
            return None
        return _from_rows(folder, self.name, rows, "file_name", CONDITION_COLUMNS, leave)


class Folders:
    """`images/` and `conditions/` with equal names."""

    name = "images"

    def is_in(self, folder: Path) -> bool:
        return is_dir(folder / "images") and self._conditions(folder) is not None

    def read(self, folder: Path, leave: tuple[Path, ...]) -> Pairs:
        beside = self._conditions(folder)
        assert beside is not None
        places = folder / "images", beside
        seen = [look(place, is_data) for place in places]
        images, conditions = (
            {str(picture).removeprefix(f"{place}/").removesuffix(picture.suffix): picture for picture in below.pictures}
            for place, below in zip(places, seen, strict=True)
        )
        both = sorted(images.keys() & conditions.keys())
        pairs = tuple(Pair(images[n], conditions[n], _caption_beside(images[n]), _split_of(Path(n))) for n in both)
        missing = tuple(f"{beside.name}/{n}" for n in sorted(images.keys() - conditions.keys()))
        extra = tuple(f"{beside.name}/{n}" for n in sorted(conditions.keys() - images.keys()))
        skipped = tuple(text for below in seen for text in below.skipped)
        return Pairs(folder, "images", pairs, missing, extra, {}, skipped)

    @staticmethod
    def _conditions(folder: Path) -> Path | None:
        return next((folder / name for name in CONDITION_FOLDERS if is_dir(folder / name)), None)


class Tars:
    """Tar files as WebDataset has them: files whose names are equal up to the first dot are a sample, a picture (.jpg,
    .png, ...), its caption (.txt, or .json with text, prompt or caption) and a condition (.condition.png,
    .conditioning_image.png, .canny.png, .0.canny.png)."""

    name = "webdataset"

    def is_in(self, folder: Path) -> bool:
        return any(folder.glob("*.tar"))

    def read(self, folder: Path, leave: tuple[Path, ...]) -> Pairs:
        pairs, extra = [], []
        tars = sorted(folder.glob("*.tar"))
        for tar in tars:
            own, alone = pairs_in(tar)
            pairs += own
            extra += alone
        if any(pair.condition for pair in pairs):  # then a sample without one is no pair
            extra += [str(pair.image) for pair in pairs if pair.condition is None]
            pairs = [pair for pair in pairs if pair.condition]
        told = _manifest(folder)
        return Pairs(folder, self.name, tuple(pairs), _absent(tars), tuple(extra), told, unfinished(told))


def pairs_in(tar: Path) -> tuple[list[Pair], list[str]]:
    """The pairs in a tar file, and the first names of samples without a picture. Raises InputError."""
    pairs, alone = [], []
    for sample in samples_in(tar).values():
        pair = _pair_in(tar, sample)
        if pair is None:
            alone.append(str(name_of(tar, next(iter(sample.values())))))
        else:
            pairs.append(pair)
    return pairs, alone


def samples_in(tar: Path) -> dict[str, dict[str, str]]:
    """The samples of a tar file: name up to the first dot -> ending -> file. Raises InputError."""
    samples: dict[str, dict[str, str]] = {}
    for member in members(tar):
        place, _, name = member.rpartition("/")
        key, _, ending = name.partition(".")
        samples.setdefault(f"{place}/{key}", {})[ending.lower()] = member
    return samples


def pictures_in(sample: dict[str, str]) -> dict[str, str]:
    """The files of a sample that are pictures, by their endings."""
    return {ending: member for ending, member in sample.items() if f".{ending.split('.')[-1]}" in suffixes()}


def _pair_in(tar: Path, sample: dict[str, str]) -> Pair | None:
    pictures = pictures_in(sample)
    image = next((member for ending, member in pictures.items() if "." not in ending), None)
    if image is None:
        return None
    maps = tuple(name_of(tar, member) for ending, member in pictures.items() if "." in ending)
    row = read_object(read_member(tar, sample["json"]), f"{tar}#{sample['json']}") if "json" in sample else {}
    caption = caption_of(row, f"{tar}#{image}")
    if "txt" in sample:
        caption = decoded(read_member(tar, sample["txt"]), f"{tar}#{sample['txt']}").strip()
    held_out = split_of_row(row)
    return Pair(name_of(tar, image), maps[0] if maps else None, caption, held_out, maps if len(maps) > 1 else ())


def _absent(tars: list[Path]) -> tuple[str, ...]:
    """Tar files that lack in a row of numbers, 000000.tar, 000001.tar, ..."""
    width = len(tars[0].stem)
    rows = [tar.stem for tar in tars if tar.stem.isdecimal() and len(tar.stem) == width]
    if not any(stem.startswith("0") for stem in rows):  # dates, say, or a single file's name
        return ()
    numbers = set(map(int, rows))
    return tuple(f"{n:0{width}d}.tar" for n in range(max(numbers)) if n not in numbers)


class Photos:
    """Pictures, with captions in files beside them or in metadata."""

    name = "photos"

    def is_in(self, folder: Path) -> bool:
        return True

    def read(self, folder: Path, leave: tuple[Path, ...]) -> Pairs:
        metadata = metadata_of(folder)
        rows = rows_of(metadata) if metadata else []
        seen = look(folder, is_data, leave)
        if seen.data and not rows:
            first, more = seen.data[0], f" and {len(seen.data) - 1} more" if len(seen.data) > 1 else ""
            raise InputError(
                f"{folder}: the data lies in {first}{more}, not in this folder itself",
                f"give that folder: {quote(str(first))}",
            )
        captions = {str(row["file_name"]): caption_of(row, f"{folder}: row {n}") for n, row in enumerate(rows, 1)}
        told = {str(row["file_name"]): row for row in rows}
        found = {str(p.relative_to(folder)): p for p in seen.pictures}
        pairs = tuple(
            Pair(path, None, captions.get(name) or _caption_beside(path), split_of_row(told.get(name, {}), Path(name)))
            for name, path in found.items()
        )
        unused = [f"{place.relative_to(folder)} (its own metadata is not read)" for place in seen.data]
        missing = tuple(sorted(captions.keys() - found.keys()))
        return Pairs(folder, "photos", pairs, missing, skipped=(*seen.skipped, *unused))


FORMS: tuple[Form, ...] = (PromptJson(), ImageFolder(), Folders(), Tars(), Photos())


def is_data(folder: Path) -> bool:
    """Whether a folder has files of some form other than photos."""
    return any(form.is_in(folder) for form in FORMS[:-1])


def read_form(folder: Path, leave: tuple[Path, ...]) -> Pairs:
    """The pairs of a folder, in the first form that it has."""
    for form in FORMS:
        if form.is_in(folder) and (found := form.read(folder, leave)) is not None:
            return found
    raise AssertionError("photos are in every folder")


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
        held_out = split_of_row(row, Path(str(names[0])))
        pairs.append(Pair(paths[0], paths[1], caption_of(row, f"{folder}: row {number}"), held_out))
    seen = look(folder, is_data, leave)
    extra = [str(p.relative_to(folder)) for p in seen.pictures if p.resolve() not in named]
    return Pairs(folder, form, tuple(pairs), tuple(missing), tuple(extra), _manifest(folder), tuple(seen.skipped))


def _manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not is_file(path):
        return {}
    return read_object(read_text(path), str(path), hint="controlnet dataset build makes it again, from the photos")


def unfinished(manifest: dict) -> tuple[str, ...]:
    """What is to be told of packed data by its manifest."""
    if manifest.get("whole", True):
        return ()
    return ("manifest.json says that packing was cut off; the same command goes on with it",)


def split_of_row(row: dict, name: Path | None = None) -> bool | None:
    """Whether a pair is held out: by the `split` of its row, else by its picture's name; None if neither says it."""
    told = row.get("split")
    if isinstance(told, str) and told.strip():
        return told.strip().lower() not in TRAINING
    return _split_of(name) if name is not None else None


def _split_of(path: Path) -> bool | None:
    """Whether a picture's path, relative to the data, begins with a held-out split's name; None if it begins with no
    split's."""
    first = path.parts[0].lower()
    if len(path.parts) > 1 and first in HELD_OUT + TRAINING:
        return first in HELD_OUT
    return None


def _caption_beside(image: Path) -> str:
    for suffix in CAPTION_SUFFIXES:
        text = image.with_suffix(suffix)
        try:
            return " ".join(decoded(text.read_bytes(), str(text)).split())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{text}: cannot be read ({error.strerror})", f"ls -l {quote(str(text))}") from error
    return ""
