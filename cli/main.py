"""The command `controlnet`: its commands, and the one place where user mistakes are caught."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from controlnet.cli import dataset, detect, generate, models, replay, score, train
from controlnet.preprocessors.errors import ControlNetError

app = typer.Typer(
    name="controlnet",
    help="Spatial control for text-to-image diffusion: photos become condition maps, maps and prompts become images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(detect.app, name="detect")
app.command("generate", help=generate.HELP)(generate.generate)
app.command("replay", help=replay.HELP)(replay.replay)
app.command("score", help=score.HELP)(score.score)
app.command("train", help=train.HELP)(train.train)
app.command("status", help=train.STATUS_HELP)(train.status)
app.add_typer(dataset.app, name="dataset")
app.add_typer(models.app, name="models")


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"controlnet {importlib.metadata.version('controlnet-toolkit')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; the exit codes are `controlnet.preprocessors.errors.Exit`."""
    try:
        app(args)
    except ControlNetError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
