"""What a shell offers after a flag: names of the tables, and keys of a condition. Imports no library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from typer._click.shell_completion import CompletionItem


def _kinds() -> Iterable[str]:
    from controlnet.preprocessors.kinds import KINDS

    return KINDS


def _detectable() -> Iterable[str]:
    from controlnet.preprocessors.detectors.registry import DETECTORS

    return DETECTORS


def _detectors() -> Iterable[str]:
    from controlnet.preprocessors.detectors.registry import DETECTORS

    return dict.fromkeys(name for rows in DETECTORS.values() for name in rows)


def _bases() -> Iterable[str]:
    from controlnet.model.registry import BASES

    return BASES


def _nets() -> Iterable[str]:
    from controlnet.model.registry import NETS

    return NETS


def _models() -> Iterable[str]:
    from controlnet.preprocessors.weights import WEIGHTS

    return [*_bases(), *_nets(), *WEIGHTS]


def _modes() -> Iterable[str]:
    from controlnet.model.control.modes import MODES

    return MODES


def _weightings() -> Iterable[str]:
    from controlnet.model.control.modes import WEIGHTINGS

    return WEIGHTINGS


def _halves() -> Iterable[str]:
    from controlnet.model.control.modes import CONTROL_ON

    return CONTROL_ON


def _schedulers() -> Iterable[str]:
    from controlnet.model.sampling.schedulers import SCHEDULERS

    return SCHEDULERS


WORDS: dict[str, Callable[[], Iterable[str]]] = {
    "base": _bases,
    "mode": _modes,
    "weighting": _weightings,
    "control_on": _halves,
    "scheduler": _schedulers,
    "kind": _kinds,
    "detector": _detectors,
    "names": _models,
    "resize": lambda: ("crop", "pad", "stretch", "keep"),
    "device": lambda: ("cpu", "cuda", "mps"),
    "dtype": lambda: ("float32", "float16", "bfloat16"),
    "engine": lambda: ("eager", "graphs", "compiled", "openvino"),
    "to": lambda: ("diffusers", "original"),
}
"""Parameter -> what it may be. A path may be given for some of them as well."""
VALUES = {"detect": _detectable, "kind": _kinds, "net": _nets, "weighting": _weightings}
"""Key of a condition -> what it may be."""


def completion_of(parameter: Any) -> Callable[[Any, Any, str], list[CompletionItem]] | None:
    """The function that completes a parameter's value; None where the shell's own way will do."""
    if parameter.name == "cond":
        return _condition
    words = WORDS.get(parameter.name)
    return None if words is None else lambda context, parameter, begun: _beginning(words(), begun)


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
    return _beginning(VALUES.get(key, tuple)(), value, f"{path},{key}=")
