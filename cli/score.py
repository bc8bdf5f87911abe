"""`controlnet score IMAGE --cond MAP`: how well an image keeps to its condition, detected again on the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from controlnet.cli.bars import count_bar
from controlnet.cli.options import Json, Offline, Overwrite, Processes, Quiet, RayAddress, ShardFlag, say
from controlnet.model.work.batch import read_jobs_file
from controlnet.model.work.crew import places
from controlnet.model.work.machine import silence_libraries
from controlnet.model.work.outputs import check_png, keeps
from controlnet.preprocessors.errors import Exit, UsageError
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.shards import parse_shard

if TYPE_CHECKING:
    from controlnet.model.work.score import LineScores


Image = Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="An image that generate made, or any other.")]
Cond = Annotated[
    list[str] | None,
    typer.Option(
        "--cond", metavar="PATH[,kind=KIND][,detect=KIND]",
        help="The map it should keep to, or OpenPose's JSON; repeat for several. (default: the image's record's)",
    ),
]  # fmt: skip
JobsFile = Annotated[
    str | None,
    typer.Option("--jobs", metavar="FILE", help='JSON Lines, {"image": ..., "cond": ...} each; means with intervals.'),
]
Overlay = Annotated[Path | None, typer.Option(metavar="FILE", help="Also a picture that shows where control failed.")]


def score(
    image: Image = None,
    cond: Cond = None,
    jobs: JobsFile = None,
    overlay: Overlay = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
    shard: ShardFlag = None,
    processes: Processes = None,
    ray: RayAddress = None,
    quiet: Quiet = False,
) -> None:
    part, used = parse_shard(shard), places(processes, None, ray)
    if (image is None) == (jobs is None):
        raise UsageError("give an image, or --jobs with a file of them", "controlnet score out/7-photo.png")
    if overlay is not None:
        if jobs is not None:
            raise UsageError("--overlay shows one image", "controlnet score IMAGE --overlay overlay.png")
        check_png("--overlay", overlay)
        keeps(overlay, overwrite, skip_existing=False)
    silence_libraries()
    from controlnet.model.work import score, sheets  # torch and OpenCV

    if jobs is not None:
        lines = [line for line in read_jobs_file(jobs) if part.holds(str(line[1]))]
        scores = score.score_lines([given for _, given in lines], offline, used, ray)
        _tell_scores([where for where, _ in lines], scores, as_json, quiet, score.interval)
        return
    assert image is not None
    results = score.Scorer(offline, say).of_file(image, cond or [])
    if overlay is not None:
        sheets.write_overlay(overlay, image, results)
        say(f"look at {overlay}")
    for path, one in results:
        if as_json:
            print(dumps({"image": image, "cond": path, "kind": one.kind, **_rounded(one.scores)}))
        else:
            print(f"{path} ({one.kind})")
            for name, value in one.scores.items():
                print(f"  {name.replace('_', ' '):18}{value:8.3f}")


def _tell_scores(
    wheres: list[str], scores: Iterable[LineScores], as_json: bool, quiet: bool, interval: Callable
) -> None:
    """A line each, then the mean of every score with its 95 % bootstrap interval. A bad line is told, and the rest goes
    on."""
    values: dict[tuple[str, str], list[float]] = {}
    failed = 0
    with count_bar("scoring", len(wheres), quiet) as on_item:
        for done, (where, one) in enumerate(zip(wheres, scores, strict=True), 1):
            for text in one.said:
                say(text)
            for image, cond, kind, found in one.rows:
                if as_json:
                    print(dumps({"image": image, "cond": cond, "kind": kind, **_rounded(found)}))
                for name, value in found.items():
                    values.setdefault((kind, name), []).append(value)
            if one.error is not None:
                failed += 1
                say(f"error: {where}: {one.error}")
            on_item(done)

    # The means, by kind and score.
    for (kind, name), all_values in values.items():
        mean, low, high = interval(all_values)
        if as_json:
            row = {"kind": kind, "score": name, "n": len(all_values), "mean": mean, "low": low, "high": high}
            print(dumps(_rounded(row)))
        else:
            print(f"{kind:9} {name.replace('_', ' '):18}{mean:8.3f}   {low:.3f} to {high:.3f}   n {len(all_values)}")
    if failed:
        say(f"{failed} of {len(wheres)} lines failed")
        raise typer.Exit(Exit.PARTIAL)


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}
