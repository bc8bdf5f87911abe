"""`controlnet models show|convert`: describe model files; convert one layout to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from controlnet.cli.options import Json, Overwrite, say, tell
from controlnet.model.training.runfolder import RunFolder
from controlnet.model.work.machine import silence_libraries
from controlnet.preprocessors.errors import OutputError, UsageError
from controlnet.preprocessors.jsons import dumps

SHOW_HELP = "What model files are, from their headers: format, family, types, parameters."
CONVERT_HELP = "Write a model in the other layout; every tensor keeps its numbers and its type."


def show(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE", help="Folders in diffusers' layout or single files.")],
    as_json: Json = False,
) -> None:
    silence_libraries()
    from controlnet.model.files import describe

    for path in paths:
        fields = describe.described(path)
        if as_json:
            print(dumps(fields))
            continue
        print(fields.pop("path"))
        for key, value in fields.items():
            print(f"  {key.replace('_', ' '):<13}{_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value / 1e6:.2f} M" if isinstance(value, int) else str(value)


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A folder in diffusers' layout or a single file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder, or a .safetensors file for original.")],
    to: Annotated[str, typer.Option(help="diffusers (a folder) or original (one file, as other programs read).")],
    prediction: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, where a base's file does not say which.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    silence_libraries()
    from controlnet.model.files import convert as conversion

    if to not in conversion.LAYOUTS:
        raise UsageError(f"--to {to}: expected {' or '.join(conversion.LAYOUTS)}", "--to diffusers")
    if prediction not in (None, "epsilon", "v_prediction"):
        raise UsageError(f"--prediction {prediction}: expected epsilon or v_prediction", "--prediction v_prediction")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already", "add --overwrite to replace it")
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise OutputError(f"{out}: is the model itself, or holds it", "another place for the result")
    is_model = any((out / name).is_file() for name in ("model_index.json", "config.json"))
    if to == "diffusers" and out.is_dir() and (not is_model or RunFolder(out).holds_run):
        raise OutputError(f"{out}: a folder that holds more than a model; it is not replaced", f"{out}/NAME")
    conversion.convert(source, out, to, prediction)
    say(f"{source} -> {out}, {to} layout")
    tell({"output": str(out), "source": str(source), "to": to}, as_json)
