"""Maps made and reported for `controlnet detect`: of photos, and of the frames of videos."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import typer
from controlnet.cli.bars import bytes_bar, count_bar
from controlnet.cli.options import say, say_error, tell
from controlnet.model.work.crew import places
from controlnet.model.work.outputs import IMAGES, check_existing, check_png, is_folder, keeps
from controlnet.preprocessors.detectors.detector import Detector, On
from controlnet.preprocessors.errors import ControlNetError, Exit, UsageError
from controlnet.preprocessors.files import exists, is_dir
from controlnet.preprocessors.films import ENDINGS, is_clip
from controlnet.preprocessors.imports import uncollected
from controlnet.preprocessors.remote import is_url, place
from controlnet.preprocessors.shards import claim, parse_shard

if TYPE_CHECKING:
    import numpy as np
    from controlnet.model.work.clips import ClipJob
    from controlnet.model.work.maps import Detection

FEW = 4
"""No bar is shown for fewer photos than this."""
Shown = dict[str, tuple["np.ndarray", "np.ndarray"]]
"""A photo's name -> it and its map, small."""


def make_maps(
    chosen: list[tuple[Detector, Any]], weights, offline: bool, keypoints: Path | None, on: On, **given
) -> None:
    """Every chosen kind of map of every input. With several, one that fails is reported and the rest goes on."""
    with uncollected():
        from controlnet.model.work import maps
        from controlnet.preprocessors.geometry import check_resize, parse_size

    # What is asked for, and whether it can be.
    flags = SimpleNamespace(**{"steady": False} | given, keypoints=keypoints)
    check_existing(flags.overwrite, flags.skip_existing)
    size = parse_size(flags.size)
    check_resize(flags.resize)
    flags.part, flags.used = parse_shard(flags.shard), places(flags.processes, None, flags.ray)
    flags.kinds, flags.hints = [row.kind for row, _ in chosen], set()
    inputs = maps.expand(flags.inputs, flags.recursive, say)
    flags.films = [source for source in inputs if is_clip(source)]
    flags.photos = [source for source in inputs if source not in flags.films]
    _check_films(flags)
    _check_places(flags)
    flags.sheet = _sheet_of(flags)
    read = _reader(flags)
    if flags.out is not None and is_folder(flags.out, (*IMAGES, *ENDINGS)):
        settings = [[row.kind, row.name, vars(options)] for row, options in chosen]
        claim(place(flags.out), flags.part, [settings, flags.size, flags.resize, flags.photos])
    if len(chosen) > 1 and len(inputs) == 1 and flags.photos:
        read(inputs[0])  # if it is missing: reported once, not for every kind

    # One kind after another.
    failed = 0
    shown: dict[str, Shown] = {}
    missing: dict[str, str] = {}
    for detector, options in chosen:
        shown[detector.kind] = {}
        try:
            ready = None
            if flags.films or not all(maps.is_points(detector.kind, source) for source in flags.photos):
                with bytes_bar(f"fetching {', '.join(detector.weights)}", flags.quiet) as on_bytes:
                    ready = detector.ready(options, weights, offline, on_bytes, on)
            job = maps.Detection(
                detector, options, ready, size, flags.resize, read, flags.overwrite, flags.skip_existing
            )
            failed += _photos(flags, job, partial(maps.crew_of, job, weights, offline, on), shown[detector.kind])
            failed += _films(flags, job, shown[detector.kind])
        except ControlNetError as error:
            if len(chosen) == 1:
                raise
            failed += len(inputs)
            _say_error(flags, detector, error)
            missing[detector.kind] = str(error).split(" (")[0].split(": ")[-1]
    if flags.sheet is not None and any(shown.values()):
        maps.write_preview(flags.sheet, shown, missing)
        say(f"look at {flags.sheet}")
    if failed:
        say(f"{failed} of {len(inputs) * len(chosen)} maps failed")
        raise typer.Exit(Exit.PARTIAL)


def _photos(flags: SimpleNamespace, job: Detection, crew: Callable, shown: Shown) -> int:
    """Make a map of every photo in a shard and report it. Returns how many failed. One bad photo of several is reported
    and the rest goes on; a single bad one raises. `shown` gets small pictures of the first ones."""
    from controlnet.model.work import maps

    if not flags.photos:
        return 0
    targets = maps.targets_of(flags.photos, flags.out, job.detector.kind)
    if flags.sheet is not None and flags.sheet in targets.values():
        raise UsageError(f"--preview {flags.sheet}: is where a map goes", "--preview sheet.png")
    points = maps.points_of(flags.photos, flags.keypoints, targets)
    mine = [source for source in flags.photos if flags.part.holds(source)]
    orders = maps.orders_of(mine, targets, points, flags.sheet is not None)
    run = partial(maps.run, job)
    if flags.used or flags.ray is not None:
        run = partial(maps.run_by, crew(), flags.used, flags.ray)
    failed = 0
    with count_bar("detect", len(mine), flags.quiet or len(mine) < FEW) as on_item:
        for done, (source, made) in enumerate(zip(mine, run(orders, say), strict=True), 1):
            if made.error is not None:
                if len(flags.photos) + len(flags.films) == 1:
                    raise made.error
                failed += 1
                _say_error(flags, job.detector, made.error)
            elif made.png is not None:
                sys.stdout.buffer.write(made.png)
                sys.stdout.flush()
            else:
                tell(made.fields, flags.as_json)
            if made.preview is not None:
                shown[source] = made.preview
            on_item(done)
    return failed


def _films(flags: SimpleNamespace, job: Detection, shown: Shown) -> int:
    """Make the maps of every video and report them. Returns how many failed; a single one that fails raises."""
    from controlnet.model.work import clips
    from controlnet.preprocessors.clips import open_clip

    failed, several = 0, len(flags.kinds) > 1 or len(flags.films) > 1
    asked: list[ClipJob] = []
    for film in flags.films:
        out = clips.place_of(film, flags.out, job.detector.kind, several)
        if any(other.out == out for other in asked):
            raise UsageError(f"two videos would both be written to {out}", "rename one, or run them with different -o")
        try:
            asked.append(clips.ClipJob(job, open_clip(film), out, flags.every, flags.steady))
            _film(flags, asked[-1], shown)
        except ControlNetError as error:
            if len(flags.photos) + len(flags.films) == 1:
                raise
            failed += 1
            _say_error(flags, job.detector, error)
    return failed


def _say_error(flags: SimpleNamespace, detector: Detector, error: ControlNetError) -> None:
    """One of several maps that failed, with its kind where there are several."""
    say_error(f"{detector.kind}: " if len(flags.kinds) > 1 else "", error, flags.hints)


def _film(flags: SimpleNamespace, asked: ClipJob, shown: Shown) -> None:
    from controlnet.model.work import clips, maps

    name = Path(asked.clip.path).name
    with count_bar("detect", asked.count, flags.quiet) as on_item:
        for done, made in enumerate(clips.run(asked, maps.SHOWN if flags.sheet else 0, say), 1):
            if made.fields:
                tell(made.fields, flags.as_json)
            if made.preview is not None:
                shown[f"{name} {done}"] = made.preview
            on_item(min(done, asked.count or done))


def _sheet_of(flags: SimpleNamespace) -> Path | None:
    """Where the preview goes: as asked for, and of several kinds beside the maps; None for none, or one that stays."""
    sheet = flags.preview
    if sheet is not None:
        check_png("--preview", sheet)
        if sheet.suffix.lower() != ".png":
            raise UsageError(f"--preview {sheet}: expected a .png", f"--preview {sheet.with_suffix('.png')}")
    elif len(flags.kinds) > 1 and flags.photos and "-" not in flags.photos:
        name = f"{Path(flags.photos[0]).stem}.all.png" if len(flags.photos) == 1 else "all.png"
        folder = Path(flags.photos[0]).parent if flags.out is None else Path(flags.out)
        sheet = None if is_url(str(folder)) else folder / name
    if sheet is not None and flags.shard is not None:  # each shard shows its own
        part = parse_shard(flags.shard)
        sheet = sheet.with_name(f"{sheet.stem}-{part.number}-of-{part.count}{sheet.suffix}")
    if sheet is None or (flags.preview is None and exists(sheet) and not flags.overwrite):  # one nobody asked for
        return None
    return None if keeps(sheet, flags.overwrite, flags.skip_existing) else sheet


def _reader(flags: SimpleNamespace) -> Callable[[str], bytes]:
    """What gives the bytes of a source. Raises UsageError if standard input is asked for and several processes work."""
    from controlnet.preprocessors.images import read_bytes

    if "-" in flags.photos and (flags.used or flags.ray is not None):
        raise UsageError("standard input is read by one process", "the name of a file")
    return read_bytes


def _check_films(flags: SimpleNamespace) -> None:
    """Raises UsageError for flags that do not go with videos, or with photos."""
    if flags.every < 1:
        raise UsageError(f"--every {flags.every}: expected 1 or more", "--every 5")
    if not flags.films:
        if flags.steady or flags.every != 1:
            raise UsageError("--steady and --every are for videos", "controlnet detect pose clip.mp4 --steady")
        return
    if flags.used or flags.ray is not None or flags.shard is not None:
        raise UsageError("a video is made by one process, frame after frame", "leave --processes and --shard out")
    if flags.keypoints is not None:
        raise UsageError("--keypoints: a video's key points are in the PNG text of its maps", "-o maps/")


def _check_places(flags: SimpleNamespace) -> None:
    """Raises UsageError if too much would go to standard output, or to one file."""
    piped, several, out = "-" in flags.photos, len(flags.kinds) > 1, flags.out
    to_stdout = out == "-" or (out is None and piped)
    if several and to_stdout:
        raise UsageError("several kinds of map do not go to standard output", "-o maps/")
    if flags.as_json and to_stdout:
        raise UsageError("--json and a map would both go to standard output", "-o map.png --json")
    if out is None or out == "-" or out.endswith("/") or is_dir(out):
        return
    to_video = out.lower().endswith(ENDINGS)
    if to_video and flags.photos:
        raise UsageError(f"-o {out}: maps of photos are written as PNG files", f"-o {Path(out).with_suffix('')}/")
    if several and (to_video or not is_folder(out)):
        raise UsageError(f"-o {out}: several kinds of map go to a folder", f"-o {Path(out).with_suffix('')}/")
