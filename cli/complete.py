"""What a shell offers after a flag: names of the tables, and keys of a condition. Imports no library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
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


def words_of(name: str) -> list[str]:
    """What a parameter or a key may be, as far as tables say it."""
    words = list(WORDS.get(name, ()))
    for reference in NAMES.get(name, ()):
        module, table = reference.split(":")
        words += getattr(importlib.import_module(module), table)
    if name == "detector":
        from controlnet.preprocessors.detectors.registry import DETECTORS

        words += dict.fromkeys(row for rows in DETECTORS.values() for row in rows)
    return words


def completion_of(parameter: Any) -> Callable[[Any, Any, str], list[CompletionItem]] | None:
    """The function that completes a parameter's value; None where the shell's own way will do."""
    if parameter.name == "cond":
        return _condition
    if parameter.name not in (*NAMES, *WORDS, "detector"):
        return None
    return lambda context, parameter, begun: _beginning(words_of(parameter.name), begun)


def _beginning(words: Iterable[str], begun: str, before: str = "") -> list[CompletionItem]:
    """The words that go on from what was `begun`, else files."""
    found = [CompletionItem(before + word) for word in words if word.startswith(begun)]
    return found or [CompletionItem(before + begun, type="file")]


def _condition(context: Any, parameter: Any, begun: str) -> list[CompletionItem]:
    """PATH, then ,KEY=VALUE."""
    from controlnet.model.work.condition import KEYS

    path, comma, last = begun.rpartition(",")
    if not comma:
        return [CompletionItem(begun, type="file")]
    key, equals, value = last.partition("=")
    if not equals:
        return _beginning([f"{known}=" for known in KEYS], key, f"{path},")
    return _beginning(words_of(key) if key in KEYS else (), value, f"{path},{key}=")
