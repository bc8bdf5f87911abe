"""What a shell offers after a flag: names of the tables, and keys of a condition; else it offers files. Imports no
library."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from typer._click.shell_completion import CompletionItem

NAMES = {
    "base": ("controlnet.model.registry:BASES",),
    "net": ("controlnet.model.registry:NETS",),
    "names": (
        "controlnet.model.registry:BASES", "controlnet.model.registry:NETS", "controlnet.preprocessors.weights:WEIGHTS",
    ),
    "mode": ("controlnet.model.control.modes:MODES",),
    "weighting": ("controlnet.model.control.modes:WEIGHTINGS",),
    "control_on": ("controlnet.model.control.modes:CONTROL_ON",),
    "scheduler": ("controlnet.model.sampling.schedulers:SCHEDULERS",),
    "kind": ("controlnet.preprocessors.kinds:KINDS",),
    "detect": ("controlnet.preprocessors.detectors.registry:DETECTORS",),
}  # fmt: skip
"""Parameter, or key of a condition -> the tables, `module:name`, whose names it may be."""
WORDS = {
    "resize": ("crop", "pad", "stretch", "keep"),
    "device": ("cpu", "cuda", "mps"),
    "dtype": ("float32", "float16", "bfloat16"),
    "engine": ("eager", "graphs", "compiled", "openvino"),
    "to": ("diffusers", "original"),
    "form": ("webdataset", "parquet"),
}
"""The same, written out: their modules import torch."""
NUMBERS = {"scale": ("0.5", "1"), "start": ("0", "0.5"), "end": ("0.5", "1")}
"""Keys of a condition that are numbers, and some of them."""
COMPLETING = "_CONTROLNET_COMPLETE"
"""What the shell's script sets, to `complete_bash` and the like."""


def words_of(name: str, command: str = "") -> list[str]:
    """What a parameter of a command or a key may be, as far as tables say it."""
    words = list(WORDS.get(name, ()))
    for reference in NAMES.get(name, ()):
        module, table = reference.split(":")
        words += getattr(importlib.import_module(module), table)
    if name == "detector":
        from controlnet.preprocessors.detectors.registry import DETECTORS

        kinds = [DETECTORS[command]] if command in DETECTORS else DETECTORS.values()
        words += dict.fromkeys(row for rows in kinds for row in rows)
    return words


def completion_of(parameter: Any) -> Callable[[Any, Any, str], list[CompletionItem]] | None:
    """The function that completes a parameter's value; None where the shell's own way will do."""
    if parameter.name == "cond":
        return _condition
    if parameter.name not in (*NAMES, *WORDS, "detector"):
        return None
    return lambda context, parameter, begun: [
        CompletionItem(word) for word in words_of(parameter.name, context.info_name) if word.startswith(begun)
    ]


def join_words(environment: MutableMapping[str, str]) -> None:
    """Put together what bash took apart: it gives `a=b` as three words, and replaces the last one of them."""
    if not _in_bash(environment):
        return
    try:
        words, at = shlex.split(environment["COMP_WORDS"]), int(environment["COMP_CWORD"])
    except (KeyError, ValueError):  # a quote that is not closed yet
        return
    joined = [""]
    for word in [*words, ""][: at + 1]:
        if "=" in (word, joined[-1][-1:]) and joined[-1]:
            joined[-1] += word
        else:
            joined.append(word)
    environment.update(COMP_WORDS=shlex.join(joined[1:]), COMP_CWORD=str(len(joined) - 2))


def _condition(context: Any, parameter: Any, begun: str) -> list[CompletionItem]:
    """PATH, then ,KEY=VALUE. Of one key its values are offered: after one candidate alone bash sets a space."""
    from controlnet.model.work.condition import KEYS

    path, comma, last = begun.rpartition(",")
    if not comma:
        return []
    keys = [key for key in KEYS if f"{key}=".startswith(last) or last.startswith(f"{key}=")]
    words = [f"{key}=" for key in keys]
    if len(keys) == 1:
        words = [words[0] + value for value in (*NUMBERS.get(keys[0], ()), *words_of(keys[0]))] or words
    there = len(begun.rpartition("=")[0]) + 1 if "=" in begun and _in_bash(os.environ) else 0
    return [CompletionItem(f"{path},{word}"[there:]) for word in words if word.startswith(last)]


def _in_bash(environment: Mapping[str, str]) -> bool:
    return environment.get(COMPLETING) == "complete_bash"
