"""`--show`: results in the terminal, where it shows pictures (kitty, sixel), else in coloured half blocks."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from controlnet.cli.values import options_of
from controlnet.preprocessors.errors import UsageError, reason

HEIGHT = 20
"""Lines of the terminal that a picture takes."""
_console: Any = None


def _begin(wanted: bool) -> None:
    global _console
    if not wanted:
        return
    if not sys.stdout.isatty():
        raise UsageError(
            "--show: standard output is not a terminal", "--preview sheet.png, or controlnet report FOLDER"
        )
    logging.getLogger("textual_image").setLevel(logging.CRITICAL)  # it tells, at length, what a terminal cannot do
    try:
        import textual_image.renderable  # noqa: F401  (it asks the terminal what it can)
    except ImportError:
        raise UsageError(
            "--show needs textual-image, which is not installed", "pip install 'controlnet-toolkit[show]'"
        ) from None
    from rich.console import Console

    _console = Console()


def show(path: str) -> None:
    """A picture that was written, if --show was given. A terminal that does not answer is asked once."""
    if _console is None:
        return
    from textual_image.renderable import Image

    try:
        _console.print(Image(path, height=HEIGHT, width="auto"))
    except Exception as error:  # what terminals answer, or do not
        print(f"warning: the terminal shows no pictures ({reason(error)})", file=sys.stderr)
        close()


def is_on() -> bool:
    return _console is not None


def close() -> None:
    global _console
    _console = None


def parameters() -> list[Any]:
    """The option, as a command of Typer has it."""

    def command(
        wanted: Annotated[
            bool,
            typer.Option(
                "--show", callback=_begin, expose_value=False, help="Show each result in the terminal as well."
            ),
        ] = False,
    ) -> None: ...

    return options_of(command)
