"""`-v` and `--log FILE`, which every command has: what is done, on standard error and in a file."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.values import options_of
from controlnet.preprocessors.errors import OutputError
from controlnet.preprocessors.log import LOG

LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
"""How a line of a log begins."""


class _File(logging.FileHandler):
    """A log that fails is told of once, and the work goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        LOG.removeHandler(self)
        print(f"warning: --log {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)
        with suppress(OSError):
            self.close()


def _verbose(wanted: bool) -> None:
    if wanted:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.setLevel(logging.INFO)
        _add(handler)


def _log(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and (head := path.read_bytes()[:24]) and not LINE.match(head):
            raise OutputError(f"--log {path}: exists and is not a log", "another --log FILE")
        handler = _File(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"--log {path}: cannot be written ({error.strerror})", "--log run.log") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _add(handler)
    LOG.debug("%s", shlex.join(["controlnet", *sys.argv[1:]]))


def _add(handler: logging.Handler) -> None:
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False
    LOG.addHandler(handler)


def close() -> None:
    """Take off what a command added; a program that calls `main` several times would have it twice."""
    for handler in [one for one in LOG.handlers if not isinstance(one, logging.NullHandler)]:
        LOG.removeHandler(handler)
        with suppress(OSError):  # a full disk, which was told
            handler.close()


def parameters() -> list[Any]:
    """The two options, as a command of Typer has them."""

    def command(
        verbose: Annotated[
            bool,
            typer.Option(
                "-v", "--verbose", callback=_verbose, expose_value=False, is_eager=True, help="Say what is done."
            ),
        ] = False,
        log: Annotated[
            Path | None,
            typer.Option(
                "--log", metavar="FILE", callback=_log, expose_value=False, is_eager=True,
                help="Write what is done and said to a file, with the time of day; it grows.",
            ),
        ] = None,
    ) -> None: ...  # fmt: skip

    return options_of(command)
