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
from controlnet.cli.options import say, tell
from controlnet.model.work.crew import places
from controlnet.model.work.outputs import check_png, is_folder, keeps
from controlnet.preprocessors.detectors.detector import Detector, On
from controlnet.preprocessors.errors import ControlNetError, Exit, UsageError
from controlnet.preprocessors.imports import uncollected
from controlnet.preprocessors.remote import is_url, place
from controlnet.preprocessors.shards import Shard, claim, parse_shard

if TYPE_CHECKING:
    from controlnet.model.work.maps import Detection

FEW = 4
"""No bar is shown for fewer photos than this."""


def make_maps(
    chosen: list[tuple[Detector, Any]], weights, offline: bool, keypoints: Path | None, on: On, **given
) -> None:
    """Every chosen kind of map of every input. With several, one that fails is reported and the rest goes on."""
    with uncollected():
        from controlnet.model.work import maps
        from controlnet.preprocessors import geometry
        from controlnet.preprocessors.clips import is_clip

    flags = SimpleNamespace(**given)  # those of COMMON
    wanted = geometry.parse_size(flags.size)
    if flags.resize not in geometry.RESIZES:
        raise UsageError(f"--resize {flags.resize!r}: expected one of {', '.join(geometry.RESIZES)}", "--resize crop")
    part, used = parse_shard(flags.shard), places(flags.processes, None, flags.ray)
    sources = maps.expand(flags.inputs, flags.recursive, say)
    several = len(chosen) > 1
    films = [source for source in sources if is_clip(source)]
    _check_films(flags, films, sources, used)
    sources = [source for source in sources if source not in films]
    _check_places(flags.out, "-" in sources, several, flags.as_json)
    preview = _sheet_of(flags, sources, several)
    read = _reader(sources, alone=not used and flags.ray is None)
    if flags.out is not None and is_folder(flags.out):
        settings = [[row.kind, row.name, vars(options)] for row, options in chosen]
        claim(place(flags.out), part, [settings, flags.size, flags.resize, sources])
    if several and len(sources) == 1:
        read(sources[0])  # if it is missing: reported once, not for every kind
    failed, shown, missing = 0, {}, {}
    for detector, options in chosen:
        try:
            ready = None
            if films or not all(maps.is_points(detector.kind, source) for source in sources):
                with bytes_bar(f"fetching {', '.join(detector.weights)}", flags.quiet) as on_bytes:
                    ready = detector.ready(options, weights, offline, on_bytes, on)
            job = maps.Detection(
                detector, options, ready, wanted, flags.resize, read, flags.overwrite, flags.skip_existing
            )
            run = partial(maps.run, job)
            if used or flags.ray is not None:
                run = partial(maps.run_by, maps.crew_of(job, weights, offline, on), used, flags.ray)
            missed, shown[detector.kind] = _run(
                maps, run, job.detector.kind, sources, part, flags.out, flags.as_json, keypoints, preview is not None,
                flags.quiet,
            )  # fmt: skip
            failed += missed
            for film in films:
                shown[detector.kind] |= _run_film(job, film, flags, preview is not None, several or len(films) > 1)
        except ControlNetError as error:
            if not several:
                raise
            failed += len(sources)
            say(f"error: {detector.kind}: {error}")
            shown[detector.kind], missing[detector.kind] = {}, str(error).split(" (")[0].split(": ")[-1]
    if preview is not None and any(shown.values()):
        maps.write_preview(preview, shown, missing)
        say(f"look at {preview}")
    if failed:
        say(f"{failed} of {len(sources) * len(chosen)} maps failed")
        raise typer.Exit(Exit.PARTIAL)


def _sheet_of(flags: SimpleNamespace, sources: list[str], several: bool) -> Path | None:
    """Where the preview goes: as asked for, and of several kinds beside the maps; None for none, or one that stays."""
    sheet = flags.preview
    if sheet is not None:
        check_png("--preview", sheet)
    elif several and sources and "-" not in sources:
        name = f"{Path(sources[0]).stem}.all.png" if len(sources) == 1 else "all.png"
        folder = Path(sources[0]).parent if flags.out is None else Path(flags.out)
        sheet = None if is_url(str(folder)) else folder / name
    return None if sheet is None or keeps(sheet, flags.overwrite, flags.skip_existing) else sheet


def _reader(sources: list[str], alone: bool) -> Callable[[str], bytes]:
    """What gives the bytes of a source; standard input is read once for all kinds. Raises UsageError if it is asked for
    and several processes work."""
    from controlnet.preprocessors.images import read_bytes

    if "-" not in sources:
        return read_bytes
    if not alone:
        raise UsageError("standard input is read by one process", "the name of a file")
    piped = read_bytes("-")
    return lambda source: piped if source == "-" else read_bytes(source)


def _check_films(flags: SimpleNamespace, films: list[str], sources: list[str], used: list) -> None:
    """Raises UsageError for flags that do not go with videos, or with photos."""
    if flags.every < 1:
        raise UsageError(f"--every {flags.every}: expected 1 or more", "--every 5")
    if not films and (flags.steady or flags.every != 1):
        raise UsageError("--steady and --every are for videos", "controlnet detect pose clip.mp4 --steady")
    if films and (used or flags.ray is not None or flags.shard is not None):
        raise UsageError(
            "a video is made by one process, in the order of its frames", "leave --processes and --shard out"
        )
    if films and len(sources) > 1 and flags.out is not None and flags.out.lower().endswith(".png"):
        raise UsageError(f"-o {flags.out}: takes one map", "-o maps/")


def _run_film(job: Detection, film: str, flags: SimpleNamespace, previews: bool, several: bool) -> dict[str, tuple]:
    """Make the maps of a video and report them. Returns small pictures of its first frames and their maps."""
    from controlnet.model.work import clips, maps
    from controlnet.preprocessors.clips import open_clip

    asked = clips.ClipJob(
        job, open_clip(film), clips.place_of(film, flags.out, job.detector.kind, several), flags.every, flags.steady
    )
    shown = {}
    with count_bar("detect", asked.count, flags.quiet) as on_item:
        for done, made in enumerate(clips.run(asked, maps.SHOWN if previews else 0), 1):
            if made.fields:
                tell(made.fields, flags.as_json)
            if made.preview is not None:
                shown[f"{Path(film).name} {done}"] = made.preview
            on_item(min(done, asked.count or done))
    return shown


def _check_places(out: str | None, piped: bool, several: bool, as_json: bool) -> None:
    """Raises UsageError if too much would go to standard output, or several kinds to one file."""
    to_stdout = out == "-" or (out is None and piped)
    if several and to_stdout:
        raise UsageError("several kinds of map do not go to standard output", "-o maps/")
    if several and out is not None and not is_folder(out):
        raise UsageError(f"-o {out}: several kinds of map go to a folder", f"-o {Path(out).with_suffix('')}/")
    if as_json and to_stdout:
        raise UsageError("--json and a map would both go to standard output", "-o map.png --json")


def _run(
    maps,
    run: Callable,
    kind: str,
    sources: list[str],
    part: Shard,
    out: str | None,
    as_json: bool,
    keypoints: Path | None,
    previews: bool,
    quiet: bool,
):
    """Make a map of every source in a shard and report it. Returns how many failed, and small pictures of the first
    photos and maps. One bad photo of several is reported and the rest goes on; a single bad one raises."""
    targets = maps.targets_of(sources, out, kind)
    points = maps.points_of(sources, keypoints, targets)
    mine = [source for source in sources if part.holds(source)]
    orders = maps.orders_of(mine, targets, points, previews)
    failed, shown = 0, {}
    with count_bar("detect", len(mine), quiet or len(mine) < FEW) as on_item:
        for done, (source, made) in enumerate(zip(mine, run(orders, say), strict=True), 1):
            if made.error is not None:
                if len(sources) == 1:
                    raise made.error
                failed += 1
                say(f"error: {made.error}")
            elif made.png is not None:
                sys.stdout.buffer.write(made.png)
                sys.stdout.flush()
            else:
                tell(made.fields, as_json)
            if made.preview is not None:
                shown[source] = made.preview
            on_item(done)
    return failed, shown
