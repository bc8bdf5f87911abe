"""Progress bars on standard error, shown when someone is watching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from controlnet.cli import show


def _is_watched(quiet: bool) -> bool:
    """Whether bars are drawn: not among the pictures of --show."""
    return sys.stderr.isatty() and not quiet and not show.is_on()


@contextmanager
def count_bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over `total` items; yields on_item(done)."""
    if not _is_watched(quiet):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def bytes_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes; yields on_bytes(done, of) and shows nothing before its first call."""
    if not _is_watched(quiet):
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: list = []

        def on_bytes(done: int, of: int) -> None:
            if not tasks:
                tasks.append(bar.add_task(what, total=of))
            bar.update(tasks[0], completed=done, total=of)

        yield on_bytes


@contextmanager
def images_bar(total: int, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar over images with the time left; yields on_step(images), where a fraction is part of an image."""
    if not _is_watched(quiet):
        yield lambda images: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    count = TextColumn("{task.completed:.1f}/{task.total}")
    columns = (TextColumn("generate"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generate", total=total)
        yield lambda images: bar.update(task, completed=images)
