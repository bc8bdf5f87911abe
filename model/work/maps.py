"""Stage one on many photos: read, detected and written by several threads, reported in order."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from controlnet.model.work.cluster import share
from controlnet.model.work.crew import Crew, killed_twice
from controlnet.model.work.machine import keep_freed_memory
from controlnet.model.work.outputs import keeps, output_path
from controlnet.preprocessors.condition import Condition, recorded
from controlnet.preprocessors.detectors.detector import Detector, On, Ready
from controlnet.preprocessors.doubts.values import is_flat
from controlnet.preprocessors.errors import ControlNetError, InputError, ModelError, NothingFoundError, UsageError
from controlnet.preprocessors.files import is_dir, is_file, write_file
from controlnet.preprocessors.films import is_clip
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import read_image, suffixes, why_skipped
from controlnet.preprocessors.keypoints import draw_json, to_json
from controlnet.preprocessors.kinds import KINDS, kind_named
from controlnet.preprocessors.metadata import load, sha256
from controlnet.preprocessors.remote import is_url, place
from controlnet.preprocessors.sheet import Cell, write_sheet
from controlnet.preprocessors.stage_one import record, stage_one
from PIL import Image

AHEAD = 4
"""Photos in work at once, per thread, so that memory does not grow with the number of photos."""
SHOWN = 24
"""Photos on a preview."""
HIDDEN = np.uint8(127)
"""How what a map hides is shown on it."""
COLUMNS = 6
"""Of the preview of one photo."""


@dataclass(frozen=True)
class Detection:
    """What is to be done with every photo. `size` is (width, height)."""

    detector: Detector
    options: Any
    ready: Ready | None
    """None where there are only key points to draw."""
    size: tuple[int, int]
    resize: str
    read: Callable[[str], bytes]
    """The bytes of a source."""
    overwrite: bool = False
    skip_existing: bool = False


@dataclass(frozen=True)
class Made:
    """What became of a photo: fields to report, the map as PNG if it goes to standard output, a preview, or an
    error."""

    fields: dict
    png: bytes | None = None
    preview: tuple[np.ndarray, np.ndarray] | None = None
    error: ControlNetError | None = None
    said: tuple[str, ...] = ()
    """Warnings of another process."""


def is_points(kind: str, source: str) -> bool:
    """Whether a source holds key points to be drawn, instead of being a photo."""
    return kind == "pose" and source.lower().endswith(".json")


def targets_of(sources: list[str], out: str | None, kind: str) -> dict[str, Path | None]:
    """Where each map goes; None for standard output. Raises UsageError when two would go to one place."""
    targets = {}
    for source in sources:
        path = place("stdin" if source == "-" else source)
        # Standard input has no folder of its own: its map goes to standard output unless -o names a place.
        to = "-" if source == "-" and out is None else out
        targets[source] = output_path(to, path.with_name(f"{path.stem}.{kind}.png"), len(sources) > 1)
    places = list(targets.values())
    if len(set(places)) < len(places):
        twice = next(p for p in places if places.count(p) > 1)
        raise UsageError(f"two inputs would both be written to {twice}", "rename one, or run them with different -o")
    return targets


def points_of(sources: list[str], keypoints: Path | None, targets: dict[str, Path | None]) -> dict[str, Path | None]:
    """Where the key points of each source go; None for nowhere. Raises UsageError when a place is taken twice."""
    if keypoints is None:
        return dict.fromkeys(sources)
    folder = len(sources) > 1 or keypoints.is_dir()
    points: dict[str, Path | None]
    points = {s: keypoints / f"{Path(s).stem}.json" if folder else keypoints for s in sources}
    if len(set(points.values())) < len(sources) or set(points.values()) & set(targets.values()):
        raise UsageError(f"--keypoints {keypoints}: two results would be written to one place", "--keypoints points/")
    return points


Order = tuple[str, Path | None, Path | None, bool]
"""A source, where its map and its key points go, and whether a preview is wanted."""


def orders_of(
    sources: list[str], targets: dict[str, Path | None], points: dict[str, Path | None], previews: bool
) -> list[Order]:
    """An order for each source; with `previews`, the first ones come with a small photo and map."""
    return [(source, targets[source], points[source], previews and i < SHOWN) for i, source in enumerate(sources)]


def run(job: Detection, orders: list[Order], say: Callable[[str], None] = lambda text: None) -> Iterator[Made]:
    """What became of every order, in turn. A photo that fails is reported in its turn. `say` gets warnings about
    pictures."""
    if len(orders) == 1:
        return iter([_tried(job, orders[0], say)])
    return in_turn(lambda order: _tried(job, order, say), orders)


def run_by(
    crew: Crew[Order, Made],
    devices: list[str | None],
    ray: str | None,
    orders: list[Order],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Made]:
    """The same in several processes."""
    for made in share(orders, crew, devices, ray):
        for line in made.said:
            say(line)
        yield made


def crew_of(job: Detection, weights: Path | None, offline: bool, on: On) -> Crew[Order, Made]:
    """Processes that do this; each makes its own detector ready."""
    return Crew(partial(_make_worker, replace(job, ready=None), weights, offline, on), _died, on_devices=False)


def _make_worker(
    job: Detection, weights: Path | None, offline: bool, on: On, device: str | None
) -> Callable[[Order], Made]:
    def work(order: Order) -> Made:
        nonlocal job
        said: list[str] = []
        if job.ready is None and not is_points(job.detector.kind, order[0]):
            job = replace(job, ready=job.detector.ready(job.options, weights, offline, on=on))
        made = _tried(job, order, said.append)
        return replace(made, said=tuple(said))

    return work


def _died(order: Order) -> Made:
    error = killed_twice()
    return Made({}, error=ModelError(f"{order[0]}: {error}", error.hint))


def _tried(job: Detection, order: Order, say: Callable[[str], None]) -> Made:
    try:
        return _one(job, *order, say)
    except ControlNetError as error:
        return Made({}, error=error)


def in_turn(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """work(item) of every item, in turn; several are in work at once, and few wait. If the command is interrupted,
    those that are finished are still yielded."""
    threads = os.cpu_count() or 1
    cv2.setNumThreads(1)  # each core takes a photo of its own, not a part of one
    keep_freed_memory()  # the next photo needs as much: a tenth of the time
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        yield from (future.result() for future in waiting if _is_ready(future))
        raise
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _is_ready(future: Future) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _one(
    job: Detection,
    source: str,
    target: Path | None,
    keypoints: Path | None,
    preview: bool,
    say: Callable[[str], None],
) -> Made:
    data = job.read(source)
    digest = sha256(data)
    name = Path(source).name
    if target is not None and is_file(target) and job.skip_existing:
        if stays(job, target, name, digest, others=keypoints is None or keypoints.exists()):
            return Made({"output": str(target), "source": source, "kind": job.detector.kind, "skipped": True})
    elif target is not None:
        # With --skip-existing another process may have made the map meanwhile: it is written once more.
        keeps(target, job.overwrite or job.skip_existing, skip_existing=False)
    image = None
    if is_points(job.detector.kind, source):
        map_, fields = draw_json(data, source, job.size, job.resize, job.options.allow_empty)
        made = record(job.detector, job.options, (map_.shape[1], map_.shape[0]), job.resize, name, digest)
        condition = recorded(map_, "pose", source, made | fields)
    else:
        assert job.ready is not None
        image, _ = read_image(data, source, lambda text: say(f"warning: {text}"))
        try:
            condition = stage_one(image, job.ready, job.size, job.resize, name, digest)
        except NothingFoundError as error:
            raise NothingFoundError(f"{source}: {error}", error.hint) from error
        if kind_named(condition.kind).is_lines and is_flat(condition.rgb):
            say(f"warning: {source}: no lines found, its map is empty")
    if keypoints is not None:
        # With --skip-existing, key points are written again whenever their map is.
        keeps(keypoints, job.overwrite or job.skip_existing, skip_existing=False)
        write_file(keypoints, to_json(condition.record["keypoints"], condition.size))
    both = small(image, condition, job.resize) if preview else None
    if target is None:
        return Made(condition.record, condition.png(), both)
    write_file(target, condition.png())
    return Made({"output": str(target), **condition.record, "source": source}, preview=both)


def small(image: np.ndarray | None, condition: Condition, resize: str) -> tuple[np.ndarray, np.ndarray]:
    """A photo (for key points the pose map instead) and its map, with 256 pixels on the longer side."""
    width, height = condition.size
    ratio = 256 / max(width, height)
    small = max(1, round(width * ratio)), max(1, round(height * ratio))
    shown = condition.rgb if image is None else fit(image, condition.size, resize)
    eight = condition.rgb if condition.map.dtype == np.uint8 else (condition.rgb >> 8).astype(np.uint8)
    if condition.map.shape[-1] == 4:
        eight = np.where(condition.map[..., 3:] > 0, eight, HIDDEN)
    return fit(shown, small, "stretch"), fit(eight, small, "stretch")


def stays(
    job: Detection, target: Path, name: str, digest: str, more: dict[str, Any] | None = None, others: bool = True
) -> bool:
    """Whether an existing map is left as it is: the one that would be made again of a photo with this name and sha256,
    or one that is none of ours. `others`: whether what is made beside the map is there as well."""
    before, size = _record_of(target)
    if before is None:
        return True
    wanted = size if job.resize == "keep" else job.size
    again = record(job.detector, job.options, wanted, job.resize, name, digest) | (more or {})
    return others and again.items() <= before.items()


def _record_of(target: Path) -> tuple[dict | None, tuple[int, int]]:
    """The record in an existing map's PNG text, and the map's size; None for a file that is not ours."""
    try:
        with Image.open(io.BytesIO(target.read_bytes()) if is_url(target) else target) as picture:
            return load(getattr(picture, "text", {})) or None, picture.size
    except OSError:
        return None, (0, 0)


def expand(
    inputs: list[str],
    recursive: bool,
    say: Callable[[str], None] = lambda text: None,
    maps_too: bool = False,
    again: str = "detect canny",
) -> list[str]:
    """Folders become the pictures in them, sorted, unless `maps_too` without earlier maps (`*.KIND.png`). Raises
    InputError for a folder without pictures; `again` is the command that its hint names. `say` gets a warning if
    pictures or videos are skipped."""
    maps = () if maps_too else (*(f".{kind}.png" for kind in KINDS), ".all.png")
    sources: list[str] = []
    films = 0
    for name in inputs:
        if not name:
            raise UsageError("an empty name in place of a photo", "controlnet detect canny PHOTO")
        if name == "-" or not is_dir(name):
            sources.append(name)
            continue
        inside = sorted(path for path in place(name).glob("**/*" if recursive else "*") if is_file(path))
        found = [str(p) for p in inside if p.suffix.lower() in suffixes() and not p.name.endswith(maps)]
        films += sum(is_clip(path.name) for path in inside)
        if skipped := [f"{path} ({why})" for path in inside if (why := why_skipped(path))]:
            say(f"warning: {len(skipped)} pictures skipped, the first: {skipped[0]}")
        if not found:
            raise InputError(
                f"{name}: the folder holds no pictures (it is searched for {', '.join(sorted(suffixes())[:8])}, ...)",
                f"controlnet {again} {name} --recursive",
            )
        sources += found
    if films:
        say(f"warning: {films} videos in folders are skipped; a video is made when it is named itself")
    return list(dict.fromkeys(sources))


def write_preview(
    path: Path, shown: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], missing: dict[str, str]
) -> None:
    """A contact sheet of what was detected: every photo with its maps beside it. `shown` is kind -> photo's name ->
    (photo, map), `missing` says why a kind has none. Raises OutputError."""
    cells: list[Cell] = []
    photos = list(dict.fromkeys(source for kind in shown.values() for source in kind))
    for source in photos:
        own = {kind: pictures[source] for kind, pictures in shown.items() if source in pictures}
        cells.append((next(iter(own.values()))[0], Path(source).name))
        blank = 0 * cells[-1][0] + 230
        for kind in shown:
            told = kind if kind in own else f"{kind}: {missing.get(kind, 'none')}"
            cells.append((own[kind][1] if kind in own else blank, told))
    columns = len(shown) + 1
    if columns == 2 < len(cells):
        columns = 4
    write_sheet(path, cells, min(columns, COLUMNS) if len(photos) == 1 else columns)
