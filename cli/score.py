"""`controlnet score IMAGE --cond MAP`: how well an image keeps to its condition, detected again on the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from controlnet.cli.bars import count_bar
from controlnet.cli.options import Json, Offline, Overwrite, Quiet, ShardFlag, say
from controlnet.model.work.batch import read_jobs_file
from controlnet.model.work.outputs import check_png, keeps
from controlnet.preprocessors.errors import ControlNetError, Exit, UsageError
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.shards import Shard, parse_shard

if TYPE_CHECKING:
    from controlnet.model.work.score import Scorer


Image = Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="An image that generate made, or any other.")]
Cond = Annotated[
    list[str] | None,
    typer.Option(
        "--cond", metavar="PATH[,kind=KIND]",
        help="The map it should keep to, or OpenPose's JSON; repeat for several. (default: the image's record's)",
    ),
]  # fmt: skip
JobsFile = Annotated[
    Path | None,
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
    quiet: Quiet = False,
) -> None:
    part = parse_shard(shard)
    if (image is None) == (jobs is None):
        raise UsageError("give an image, or --jobs with a file of them", "controlnet score out/7-photo.png")
    if overlay is not None:
        if jobs is not None:
            raise UsageError("--overlay shows one image", "controlnet score IMAGE --overlay overlay.png")
        check_png("--overlay", overlay)
        keeps(overlay, overwrite, skip_existing=False)
    from controlnet.model.work import score, sheets  # torch and OpenCV

    scorer = score.Scorer(offline, say)
    if jobs is not None:
        _score_jobs(scorer, jobs, part, as_json, quiet, score.interval)
        return
    assert image is not None
    results = scorer.of_file(image, cond or [])
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


def _score_jobs(scorer: Scorer, path: Path, part: Shard, as_json: bool, quiet: bool, interval: Callable) -> None:
    """A line each, then the mean of every score with its 95 % bootstrap interval."""
    # A bad line is told, and the rest goes on.
    lines = [line for line in read_jobs_file(path) if part.holds(str(line[1]))]
    values: dict[tuple[str, str], list[float]] = {}
    failed = 0
    with count_bar("scoring", len(lines), quiet) as on_item:
        for done, (where, given) in enumerate(lines, 1):
            try:
                if isinstance(given, UsageError):
                    raise given
                image, conditions = _line(given)
                for cond, one in scorer.of_file(image, conditions):
                    if as_json:
                        print(dumps({"image": image, "cond": cond, "kind": one.kind, **_rounded(one.scores)}))
                    for name, value in one.scores.items():
                        values.setdefault((one.kind, name), []).append(value)
            except ControlNetError as error:
                failed += 1
                say(f"error: {where}: {error}")
            on_item(done)

    # The means, by kind and score.
    for (kind, name), found in values.items():
        mean, low, high = interval(found)
        if as_json:
            row = {"kind": kind, "score": name, "n": len(found), "mean": mean, "low": low, "high": high}
            print(dumps(_rounded(row)))
        else:
            print(f"{kind:9} {name.replace('_', ' '):18}{mean:8.3f}   {low:.3f} to {high:.3f}   n {len(found)}")
    if failed:
        say(f"{failed} of {len(lines)} lines failed")
        raise typer.Exit(Exit.PARTIAL)


def _line(given: dict[str, Any]) -> tuple[str, list[str]]:
    if unknown := given.keys() - {"image", "cond"}:
        raise UsageError(f"unknown key {sorted(unknown)[0]!r}, expected image and cond", '{"image": "a.png"}')
    image, conditions = given.get("image"), given.get("cond") or []
    if not isinstance(image, str) or not image:
        raise UsageError("no image in it", '{"image": "out/7-photo.png", "cond": "photo.canny.png"}')
    conditions = [conditions] if isinstance(conditions, str) else conditions
    if not all(isinstance(c, str) for c in conditions):
        raise UsageError(f"cond: {conditions!r}, expected text or a list of texts", '"cond": "photo.canny.png"')
    return image, conditions


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}
