"""The settings of a training run: one frozen dataclass, read from TOML and from `--set key=value`."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from controlnet.model.registry import BASES
from controlnet.model.training.loop import LoopConfig
from controlnet.preprocessors.errors import InputError, UsageError

ALIASES = {"lr": "learning_rate", "steps": "max_steps", "bs": "batch_size", "gradient_accumulation": "accumulation"}
"""What other trainers call a setting."""
CHOICES = {
    "copy": ("full", "lite"),
    "convolutions": ("zero", "gaussian"),
    "hint": ("released", "paper"),
}


MOST = {
    "size": (4096, "a picture of 4096 pixels a side needs some 100 GB already"),
    "batch_size": (65_536, "all pairs of a batch are in memory at once; accumulation adds batches up"),
    "accumulation": (65_536, "that many batches make one step"),
    "crops": (1000, "each crop of each picture is kept in the cache"),
    "held_out": (10_000, "all held-out pairs are looked at each time"),
    "pictures": (10_000, "each takes 20 evaluations per pair"),
    "keep": (10_000, "a checkpoint is four times as large as the network"),
    "max_steps": (10**9, "nobody has that long"),
    "seed": (2**63 - 1, "it is a 63-bit number"),
}
"""Upper bounds of settings, and why."""


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """What is trained, on what, and how. The first defaults suit Stable Diffusion; `tiny` has its own (registry)."""

    base: str = "tiny"
    """A name (tiny, sd15), a folder in diffusers' layout, a single file or a hub id."""
    kind: str = ""
    """Kind of condition; any word for your own kind. Empty: taken from the data."""
    seed: int = 0
    """Seed of weights, order, noise and crops."""
    size: int = 0
    """Side in pixels of the training pictures; 0 is the base's native size."""
    max_steps: int = 10_000
    batch_size: int = 4
    """Pairs per forward pass, summed over all processes."""
    learning_rate: float = 1e-5
    warmup_steps: int = 50
    decay_fraction: float = 0.0
    precision: str = "float32"
    save_every: float = 600.0
    keep: int = 2
    log_every: int = 10
    prompt_dropout: float = 0.5
    """Share of prompts replaced by the empty one (paper section 3.3)."""
    min_snr: float = 0.0
    """Gamma of min-SNR weighting (arXiv 2303.09556); 0 is the plain loss."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    crops: int = 1
    """Crops of each picture: 1 is the centre one, more are drawn at random, up to 1.25 times closer."""
    buckets: bool = False
    """Canvases of the pictures' own aspects, of about size x size pixels, instead of squares."""
    flip: bool = False
    """Mirror half of the pairs, with left and right exchanged in captions and in poses with key points exchanged."""
    start_from: str = "base"
    """`base`, or a ControlNet to continue training: a folder, a single file, a hub id or a name of `models list`."""
    copy: str = "full"
    """`lite` replaces each block of the trainable copy by a single convolution (the paper's ablation)."""
    convolutions: str = "zero"
    """`gaussian` replaces the zero convolutions by ones with random weights (the paper's ablation)."""
    hint: str = "released"
    """The hint encoder: `released` (public checkpoints) or `paper` (its text; diffusers cannot load it)."""
    held_out: int = 16
    """Pairs held out from training for the control gap and the pictures, at most a quarter of all."""
    pictures: int = 8
    """How many times during the run to make pictures from held-out conditions; 0 is never."""
    cache: bool = True
    """Keep latents, texts and conditions on disk; without it VAE and text encoder run in every step."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the tensorboard package)."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "crops", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, (most, why) in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name):,}: {why}")
        for name in ("min_snr", "pictures", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.size % 8 or self.size < 0:
            raise ValueError(f"size must be a multiple of 8, got {self.size}")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout must be from 0 to 1, got {self.prompt_dropout}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


def read_config(
    paths: list[Path], assignments: list[str], defaults: dict[str, Any] | None = None, **given: Any
) -> TrainConfig:
    """The settings from `defaults`, the base's own defaults, the TOML files, the `key=value` texts and the flags
    (`given`; None means not given); later ones win.

    Raises UsageError for unknown names (with the nearest one), wrong types and values out of range.
    """
    values: dict[str, Any] = dict(defaults or {})
    for path in paths:
        try:
            values |= tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})", f"ls {Path(path).parent}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid TOML ({error})") from error
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: expected key=value", "--set max_steps=2000")
        values[name.strip()] = value.strip()
    values |= {name: value for name, value in given.items() if value is not None}
    known = BASES.get(str(values.get("base", TrainConfig.base)))
    values = (known.training if known else {}) | values
    try:
        return TrainConfig(**{name: _convert(name, value) for name, value in values.items()})
    except ValueError as error:
        raise UsageError(str(error), "controlnet train DATA --set key=value") from error


def _convert(name: str, value: Any) -> Any:
    """A value of the field's type, from TOML or text."""
    types = {f.name: str(f.type) for f in fields(TrainConfig)}
    if name not in types:
        if isinstance(value, dict):
            raise UsageError(f"a table [{name}] in the settings", "key = value, without tables")
        near = difflib.get_close_matches(ALIASES.get(name, name), types, 1, 0.5)
        raise UsageError(f"unknown setting {name!r}", f"--set {near[0]}=..." if near else "controlnet train --settings")
    wanted = types[name]
    if wanted == "bool":
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif wanted == "str":
        if isinstance(value, str):
            return value
    else:
        try:
            number = float(value)
            if wanted == "float" and not math.isnan(number):
                return number
            if number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise UsageError(f"setting {name}={value!r}: expected a {_WORDS[wanted]}", f"--set {name}=...")


_WORDS = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text"}


def to_toml(config: TrainConfig) -> str:
    """Every setting, as `read_config` reads it."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)

    return "".join(f"{f.name} = {text(getattr(config, f.name))}\n" for f in fields(config))
