"""Photos become training data: pictures and conditions of one size, captions, a manifest, a held-out split.

    DATA/images/NAME.png  DATA/conditions/NAME.png  DATA/metadata.jsonl  DATA/manifest.json

metadata.jsonl follows the imagefolder convention of the `datasets` library, so that other trainers can read the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from controlnet.preprocessors.data.pairs import Pair, Pairs
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.errors import ControlNetError, InputError, OutputError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import png_bytes, read_bytes, read_image
from controlnet.preprocessors.jsons import dumps, object_or_empty
from controlnet.preprocessors.metadata import dump, load, sha256, text_of
from controlnet.preprocessors.shards import WHOLE, Shard
from controlnet.preprocessors.stage_one import record, stage_one
from controlnet.preprocessors.workers import workers

HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 64
Order = tuple[Pair, str]
"""A photo, and the name of its pair."""
Outcome = tuple[str, ControlNetError | None]
"""The name of a pair, and why it could not be made."""
Share = Callable[[list[Order], Callable[[Order], Outcome]], Iterable[Outcome]]
"""Does work on orders, elsewhere."""


def build(
    found: Pairs,
    out: Path,
    kind: str,
    options: dict[str, Any],
    size: tuple[int, int],
    resize: str = "crop",
    jobs: int | None = None,
    on_pair: Callable[[int], None] = lambda done: None,
    part: Shard = WHOLE,
    share: Share | None = None,
) -> tuple[dict | None, list[str]]:
    """Make a data set from photos in `out`, in `jobs` processes or as `share` does it; pairs already made there from
    the same photo with the same options are kept. Returns the manifest and the errors. The last shard to finish writes
    metadata and manifest; the others' manifest is None.

    Raises InputError when no photo could be used, OutputError when nothing could be written, UsageError when `out`
    holds another data set.
    """
    names = _names(found)
    _check_same(out, {f"images/{name}.png" for name in names}, kind, size)

    # In parallel, in any order; the rows are sorted below.
    orders = [(pair, name) for name, pair in zip(names, found.pairs, strict=True) if part.holds(name)]
    work = partial(_build_pair, out.absolute(), kind, options, size, resize)
    errors: dict[str, ControlNetError] = {}
    for done, (name, error) in enumerate((share or partial(_in_processes, jobs))(orders, work), 1):
        if error is not None:
            errors[name] = error
        on_pair(done)
    if len(errors) == len(names):
        first = next(iter(errors.values()))
        kind_of_error = OutputError if isinstance(first, OutputError) else InputError
        raise kind_of_error(f"{found.folder}: none of {len(names)} photos could be used; the first: {first}")

    # Metadata and manifest, when all shards are done.
    failed = _failed_in_all(out, part, {name: str(error) for name, error in errors.items()})
    told = [str(errors[name]) for name in sorted(errors)]
    if failed is None:
        return None, told
    pairs = {name: pair for name, pair in zip(names, found.pairs, strict=True) if name not in failed}
    settings = {"kind": kind, "detector": find_detector(kind).name, "options": options, "size": list(size)}
    return _write_manifest(out, pairs, settings | {"resize": resize}, [failed[name] for name in sorted(failed)]), told


def _in_processes(jobs: int | None, orders: list[Order], work: Callable[[Order], Outcome]) -> Iterator[Outcome]:
    with workers(jobs) as pool:
        for future in as_completed([pool.submit(work, order) for order in orders]):
            yield future.result()


def _failed_in_all(out: Path, part: Shard, failed: dict[str, str]) -> dict[str, str] | None:
    """Name -> error of the photos that failed in any shard; None while others are at work."""
    if part == WHOLE:
        return failed
    write_file(_report(out, part), (json.dumps(failed) + "\n").encode())
    reports = [_report(out, Shard(number, part.count)) for number in range(1, part.count + 1)]
    if not all(report.is_file() for report in reports):
        return None
    return {name: error for report in reports for name, error in object_or_empty(report.read_bytes()).items()}


def _write_manifest(out: Path, pairs: dict[str, Pair], settings: dict[str, Any], failed: list[str]) -> dict[str, Any]:
    """Write metadata.jsonl and manifest.json for the pairs that are there."""
    rows = {row["file_name"]: row for row in (_row(pair, name, out) for name, pair in pairs.items())}
    told = {f"images/{name}.png": pair.held_out for name, pair in pairs.items()}
    _split(rows, {name: held_out for name, held_out in told.items() if held_out is not None})
    ordered = [rows[name] for name in sorted(rows)]
    lines = "".join(dumps(row) + "\n" for row in ordered)
    write_file(out / "metadata.jsonl", lines.encode())
    manifest = settings | {
        "pairs": len(rows),
        "held_out": sum(row["split"] != "train" for row in ordered),
        "failed": failed,
        "metadata_sha256": sha256(lines.encode()),
    }
    write_file(out / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def _report(out: Path, part: Shard) -> Path:
    """The file in which a shard says that it is done, and what failed."""
    return out / f".controlnet-shard-{part.number}-of-{part.count}.json"


def _row(pair: Pair, name: str, out: Path) -> dict:
    """The row of a pair that is there; the photo's hash stands in the condition's PNG text."""
    condition = f"conditions/{name}.png"
    return {
        "file_name": f"images/{name}.png",
        "conditioning_image": condition,
        "text": pair.caption,
        "source_sha256": load(text_of(out / condition)).get("source_sha256", ""),
    }


def _check_same(out: Path, names: set[str], kind: str, size: tuple[int, int]) -> None:
    """Raises UsageError when the data set in `out` has another kind or size, or none of these photos."""
    try:
        before = object_or_empty((out / "manifest.json").read_bytes())
        rows = [object_or_empty(line) for line in (out / "metadata.jsonl").read_bytes().splitlines()]
    except OSError:
        return
    if not before:
        return
    for what, then, now in (("kind", before.get("kind"), kind), ("size", before.get("size"), list(size))):
        if then != now:
            raise UsageError(f"{out}: holds pairs of {what} {then}, asked for is {now}", f"-o {out}-{kind}")
    if rows and not names & {row.get("file_name") for row in rows}:
        raise UsageError(f"{out}: holds {len(rows)} pairs of other photos", "another folder: -o DATA")


def _names(found: Pairs) -> list[str]:
    """A name for each photo: its own, with its folders; if two would be the same, eight digits of a hash of the path
    are added. It does not depend on the order of the photos."""
    paths = [p.image.relative_to(found.folder).as_posix() for p in found.pairs]
    stems = [str(Path(path).with_suffix("")).replace(os.sep, "-") for path in paths]
    count = Counter(stem.lower() for stem in stems)  # some file systems ignore case
    return [
        stem if count[stem.lower()] == 1 else f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
        for stem, path in zip(stems, paths, strict=True)
    ]


def _build_pair(
    out: Path, kind: str, options: dict[str, Any], size: tuple[int, int], resize: str, order: Order
) -> Outcome:
    """(name, what went wrong or None)."""
    pair, name = order
    try:
        _write_pair(pair, name, out, kind, options, size, resize)
    except ControlNetError as error:
        return name, error
    return name, None


def _write_pair(
    pair: Pair, name: str, out: Path, kind: str, options: dict[str, Any], size: tuple[int, int], resize: str
) -> None:
    data = read_bytes(str(pair.image))
    image_path, condition_path = out / "images" / f"{name}.png", out / "conditions" / f"{name}.png"
    detector = find_detector(kind)
    chosen = detector.load_options()(**options)
    made = record(detector, chosen, size, resize, pair.image.name, sha256(data))
    if not (image_path.is_file() and condition_path.is_file() and made.items() <= _record_of(condition_path).items()):
        image, _ = read_image(data, str(pair.image))
        write_file(image_path, png_bytes(fit(image, size, resize)))
        condition = stage_one(image, detector.ready(chosen), size, resize, pair.image.name, made["source_sha256"])
        write_file(condition_path, png_bytes(condition.map, dump(condition.record)))


def _record_of(path: Path) -> dict:
    try:
        return load(read_image(path.read_bytes(), path.name)[1])
    except ControlNetError:
        return {}


def _split(rows: dict[str, dict], told: dict[str, bool]) -> None:
    """Set each row's split: as the photos' own folders have `told`, if they name any. Otherwise a twentieth is held
    out, from 2 to 64 photos (none of fewer than 8), chosen by the photos' hashes, so that renaming changes nothing."""
    if told:
        for name, row in rows.items():
            row["split"] = "held_out" if told.get(name) else "train"
        return
    count = min(HELD_OUT_MOST, max(2, round(HELD_OUT_SHARE * len(rows)))) if len(rows) >= 8 else 0
    chosen = sorted(rows, key=lambda name: rows[name]["source_sha256"])[:count]
    for name, row in rows.items():
        row["split"] = "held_out" if name in chosen else "train"


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r}: expected true or false")
    return text.lower() == "true"


def options_of(kind: str, texts: list[str]) -> dict[str, Any]:
    """All options of a kind's default detector, changed by `key=value` texts."""
    from dataclasses import fields

    from controlnet.preprocessors.errors import UsageError

    options_type = find_detector(kind).load_options()
    types: dict[str, Any] = {f.name: type(f.default) for f in fields(options_type)}
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in types:
            raise UsageError(f"unknown option {name!r} of {kind}: expected one of {', '.join(types)}", "--set low=80")
        try:
            values[name] = _yes_or_no(value) if types[name] is bool else types[name](value)
        except ValueError as error:
            raise UsageError(f"--set {text}: expected {types[name].__name__}") from error
    return asdict(options_type(**values))
