"""`controlnet report RUN...|FOLDER`: training runs, or a folder of results, as one HTML file to look at."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from controlnet.cli.bars import count_bar
from controlnet.cli.options import Json, Offline, Overwrite, Quiet, say, tell
from controlnet.model.report.page import check_page, write_page
from controlnet.model.training.runfolder import RunFolder
from controlnet.preprocessors.errors import InputError, UsageError

Paths = Annotated[
    list[Path], typer.Argument(metavar="RUN...|FOLDER", help="Runs, side by side if several; or a folder of results.")
]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="FILE", help="The page. (default: report.html in the folder)")
]
Score = Annotated[bool, typer.Option("--score/--no-score", help="Score each image against its conditions.")]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]


def report(
    paths: Paths,
    out: Out = None,
    score: Score = True,
    open_: Open = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: is not a folder", "controlnet report runs/DATA-1, or a folder of images")
    runs = [RunFolder(path).holds_run for path in paths]
    if len(paths) > 1 and not all(runs):
        raise UsageError(
            f"{paths[runs.index(False)]}: is not a training run; expected runs, or one folder of results",
            f"controlnet report {paths[0]}",
        )
    folder = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.absolute() for path in paths]))
    page = out or folder / "report.html"
    check_page(page, overwrite)
    if all(runs):
        from controlnet.model.report.runs import runs_page

        title = paths[0].resolve().name if len(paths) == 1 else f"{len(paths)} runs"
        write_page(page, "runs.html.j2", f"{title}: training", runs_page(paths))
    else:
        _write_results(page, folder, score, offline, quiet)
    say("look at it in a browser")
    tell({"output": str(page), "of": [str(path) for path in paths]}, as_json)
    if open_:
        webbrowser.open(page.resolve().as_uri())


def _write_results(page: Path, folder: Path, score: bool, offline: bool, quiet: bool) -> None:
    from controlnet.model.report.results import results_in, results_page  # OpenCV, and torch for some detectors

    found = results_in(folder)
    scorer = None
    if score:
        from controlnet.model.work.score import Scorer

        scorer = Scorer(offline)
    with count_bar("looking at images", len(found), quiet) as on_item:
        data = results_page(found, page, scorer, on_item)
    write_page(page, "results.html.j2", f"{folder.resolve().name}: images", data)
