"""Configs of networks and schedulers as diffusers has them: missing keys filled in, impossible values refused."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from controlnet.preprocessors.errors import ModelError

PER_LEVEL = ("attention_head_dim", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim",
             "num_attention_heads", "only_cross_attention")  # fmt: skip
"""Keys whose value is one number for all levels, or a list with one per level."""


@cache
def _parameters(owner: str) -> dict[str, inspect.Parameter]:
    """The parameters of a diffusers class that have a default; empty for an unknown class."""
    import diffusers

    cls = getattr(diffusers, owner, None)
    parameters = inspect.signature(cls.__init__).parameters.values() if cls else ()
    return {p.name: p for p in parameters if p.default is not p.empty}


def defaults(owner: str) -> dict[str, Any]:
    """The default values of a diffusers class, for keys that a config leaves out."""
    return {name: parameter.default for name, parameter in _parameters(owner).items()}


def completed(config: dict[str, Any], owner: str, where: Path) -> dict[str, Any]:
    """A config with diffusers' defaults for the keys it leaves out. Raises ModelError for a value of another type than
    the default: most of these make a network that fails at its first step."""
    own = defaults(owner)
    for key, value in config.items():
        default = own.get(key)
        if default is None and key in own and _takes_numbers_alone(_parameters(owner)[key]):
            default = 1.0
        if default is None or (value is None and own[key] is None) or _is_like(value, default, key):
            continue
        raise ModelError(f"{where}: {key} of its {owner} is {value!r}, expected the like of {default!r}")
    return own | config


def _takes_numbers_alone(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is annotated as a number or None (`float | None`)."""
    words = set(re.findall(r"\w+", str(parameter.annotation))) - {"typing", "Optional", "Union", "None", "NoneType"}
    return bool(words) and words <= {"float", "int"}


def _is_like(value: Any, default: Any, key: str) -> bool:
    if key in PER_LEVEL and isinstance(value, (list, tuple)):
        return True  # the library counts them
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (int, float)):
        whole = isinstance(default, int) and isinstance(value, float) and not value.is_integer()
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not whole
    if isinstance(default, str):
        return isinstance(value, str) or (value is None and key == "mid_block_type")
    return isinstance(value, (list, tuple)) if isinstance(default, (list, tuple)) else True
