"""Pairs packed into few large files: tar files as WebDataset reads them, or Parquet as the hub shows it.

    DATA/000000.tar, 000001.tar, ...                        NAME.png  NAME.KIND.png  NAME.json
    DATA/train-00000-of-00002.parquet, validation-...       image  conditioning_image  text

Pairs are spread over the files by a hash of their names, so that every file is a random part of the whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from controlnet.preprocessors.data.pair import Pair, Pairs
from controlnet.preprocessors.errors import OutputError, UsageError
from controlnet.preprocessors.files import is_file, write_file
from controlnet.preprocessors.images import read_bytes
from controlnet.preprocessors.jsons import dumps, object_or_empty
from controlnet.preprocessors.remote import is_url
from controlnet.preprocessors.tars import split as split_name
from controlnet.preprocessors.tars import write_tar

FORMS = ("webdataset", "parquet")
ENDINGS = {"webdataset": ".tar", "parquet": ".parquet"}
MANIFEST = "manifest.json"
FIRST_TAR = "000000.tar"


def pack(
    found: Pairs,
    out: Path,
    form: str,
    kind: str,
    per_file: int,
    on_pair: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Write all pairs to `out` in a form of FORMS; returns the manifest, which is written first and says at last that
    the data is whole. Files that are there already are of an earlier try with the same pairs, or it is refused.

    Raises UsageError for a form that is not known or needs a package, OutputError if `out` holds other data, InputError
    for pairs that cannot be read.
    """
    check_form(form)
    before = check_place(out, form)
    pairs = [pair.of_kind(kind) for pair in found.pairs]
    ordered = sorted(pairs, key=lambda pair: sha256(_name(found, pair).encode()).hexdigest())
    manifest = {
        "kind": kind,
        "form": form,
        "pairs": len(ordered),
        "held_out": sum(bool(pair.held_out) for pair in ordered),
        "per_file": per_file,
        "pairs_sha256": sha256("\n".join(_mark(found, pair) for pair in ordered).encode()).hexdigest(),
    }
    write = _write_tars if form == "webdataset" else _write_tables
    if before is not None and {key: before.get(key) for key in manifest} != manifest:
        raise OutputError(f"{out}: holds other data", f"-o {out}-{form}; or remove what is there")
    _write_manifest(out, manifest, is_whole=False)
    write(found, ordered, out, kind, per_file, on_pair)
    _write_manifest(out, manifest, is_whole=True)
    return manifest


def check_form(form: str) -> None:
    """Raises UsageError for a form that is not known or needs a package that is missing."""
    if form not in FORMS:
        raise UsageError(f"--to {form}: expected one of {', '.join(FORMS)}", "--to webdataset")
    if form == "parquet":
        _datasets()


def check_place(out: Path, form: str) -> dict[str, Any] | None:
    """What the manifest in a folder, or behind a URL, says; None if there is none. Raises OutputError if there is none
    and files of this form all the same."""
    path = out / MANIFEST
    if is_file(path):
        return object_or_empty(read_bytes(str(path)))
    left = is_file(out / FIRST_TAR) if is_url(out) else any(out.glob(f"*{ENDINGS[form]}"))
    if left:
        raise OutputError(
            f"{out}: holds {ENDINGS[form]} files and no {MANIFEST} that says of what",
            f"-o {out}-{form}; or remove what is there",
        )
    return None


def is_packed(out: Path, form: str) -> bool:
    """Whether there is a data set that is whole. Raises as `check_place`."""
    before = check_place(out, form)
    return before is not None and before.get("whole", True)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError("--to parquet needs datasets", "pip install 'controlnet-toolkit[datasets]'") from None
    datasets.disable_progress_bars()
    return datasets


def _write_manifest(out: Path, manifest: dict[str, Any], is_whole: bool) -> None:
    write_file(out / MANIFEST, (json.dumps(manifest | {"whole": is_whole}, indent=2) + "\n").encode())


def _write_tars(found: Pairs, ordered: Sequence[Pair], out: Path, kind: str, per_file: int, on_pair) -> None:
    def files(pairs: Sequence[Pair], first: int) -> Iterator[tuple[str, bytes]]:
        for number, pair in enumerate(pairs, first):
            name = f"{number:08d}"
            yield f"{name}{pair.image.suffix.lower()}", pair.read(pair.image)
            if pair.condition is not None:
                yield f"{name}.{kind}{pair.condition.suffix.lower()}", pair.read(pair.condition)
            row = {"text": pair.caption, "name": _name(found, pair)} | _split(pair)
            yield f"{name}.json", dumps(row).encode()
            on_pair(number + 1)

    for number, first in enumerate(range(0, len(ordered), per_file)):
        path = out / f"{number:06d}.tar"
        if not is_file(path):
            write_tar(path, files(ordered[first : first + per_file], first))


def _write_tables(found: Pairs, ordered: Sequence[Pair], out: Path, kind: str, per_file: int, on_pair) -> None:
    datasets = _datasets()
    picture, text = datasets.Image(decode=False), datasets.Value("string")
    features = datasets.Features({"image": picture, "conditioning_image": picture, "text": text, "name": text})
    done = 0
    for split, is_held_out in (("train", False), ("validation", True)):
        pairs = [pair for pair in ordered if bool(pair.held_out) is is_held_out]
        parts = [pairs[first : first + per_file] for first in range(0, len(pairs), per_file)]
        for number, part in enumerate(parts):
            path = out / f"{split}-{number:05d}-of-{len(parts):05d}.parquet"
            if not is_file(path):
                rows = [_row(found, pair) for pair in part]
                columns = {name: [row[name] for row in rows] for name in features}
                buffer = io.BytesIO()
                datasets.Dataset.from_dict(columns, features).to_parquet(buffer, batch_size=256)
                write_file(path, buffer.getvalue())
            done += len(part)
            on_pair(done)


def _row(found: Pairs, pair: Pair) -> dict[str, Any]:
    """The row of a pair. Its pictures' names hold the kind of the condition, as files do."""

    def cell(file: Path | None) -> dict[str, Any] | None:
        return None if file is None else {"bytes": pair.read(file), "path": file.name.rpartition("#")[2]}

    image, condition = cell(pair.image), cell(pair.condition)
    return {"image": image, "conditioning_image": condition, "text": pair.caption, "name": _name(found, pair)}


def _split(pair: Pair) -> dict[str, str]:
    return {} if pair.held_out is None else {"split": "held_out" if pair.held_out else "train"}


def _name(found: Pairs, pair: Pair) -> str:
    is_below = pair.image.is_relative_to(found.folder)  # rows may name files anywhere
    return (pair.image.relative_to(found.folder) if is_below else pair.image).as_posix()


def _mark(found: Pairs, pair: Pair) -> str:
    """What tells a pair from others, and from itself when its files have changed."""
    stats = []
    for file in (pair.image, pair.condition):
        if file is not None:
            inside = split_name(str(file))
            stat = Path(inside[0] if inside else file).stat()
            stats.append((stat.st_size, stat.st_mtime_ns))
    return dumps([_name(found, pair), pair.caption, pair.held_out, stats])
