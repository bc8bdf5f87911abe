"""LoRA files as people share them: what each tensor is, and which module of which network it changes.

Names come from kohya's sd-scripts (`lora_unet_down_blocks_0_...lora_down.weight`, for SDXL with the original's blocks),
diffusers and peft (`unet.down_blocks.0...lora_A.weight`), LyCORIS (`hada_`, `lokr_`) and ComfyUI (`diffusion_model.`).
A module is known by its name with dots and underscores alike, in diffusers' words or in the original's; so the networks
themselves are the table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlnet.model.adapters.parts import Parts, file_in
from controlnet.model.files.stored import LORA_FILES
from controlnet.model.files.tensors import Header, check_finite, read_header, read_json, read_tensors
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.jsons import object_or_empty
from torch import Tensor

PREFIXES = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "unet.": "unet", "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
    "model.diffusion_model.": "unet", "diffusion_model.": "unet", "base_model.model.": "unet", "lycoris_": "unet",
    "": "unet",
}  # fmt: skip
"""How a key begins -> the part of the base."""
ENDINGS = {
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora.down.weight": "down", "_lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down", ".lora_A.default.weight": "down",
    ".lora_up.weight": "up", ".lora_B.weight": "up", ".lora.up.weight": "up", "_lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up", ".lora_B.default.weight": "up",
    ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".dora_scale": "dora", ".lora_magnitude_vector": "dora", ".lora_magnitude_vector.weight": "dora",
    ".lora_magnitude_vector.default.weight": "dora",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                                     "lokr_t2")},
    ".diff": "diff", ".diff_b": "diff_b",
}  # fmt: skip
"""How a key ends -> what its tensor is."""
FOREIGN = {
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".oft_R.weight": "OFT", ".boft_R": "BOFT", ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA", ".on_input": "IA3", ".w_norm": "norms",
    ".b_norm": "norms", ".lora_up.bias": "LoRA with a bias", ".lora_B.bias": "LoRA with a bias",
    ".vera_lambda_b": "VeRA", ".hada_s": "LoHa of another kind",
}  # fmt: skip
"""How a key ends -> the method, for those that are not read."""
KINDS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "diff": "full", "diff_b": "full"}
"""A tensor -> the method of the change that has one."""


@dataclass(frozen=True)
class Change:
    """What a file holds for one module: keys of the file by what their tensors are, with their shapes."""

    module: str
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def method(self) -> str:
        """LoRA, LoHa, LoKr, full or DoRA; empty for a change that is not whole."""
        found = next((kind for name, kind in KINDS.items() if name in self.keys), "")
        return "DoRA" if found == "LoRA" and "dora" in self.keys else found

    @property
    def rank(self) -> int:
        """The number that alpha is divided by."""
        for name, side in (("down", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0)):
            if name in self.shapes:
                return self.shapes[name][side]
        return 1

    @property
    def shape(self) -> tuple[int, int] | None:
        """(outputs, inputs x kernel) of the module that it is for; None where it cannot be told from the shapes."""
        s = self.shapes
        if {"down", "up"} <= s.keys():
            kernel = s["mid"][2:] if "mid" in s else s["down"][2:]
            return s["up"][0], _product(s["down"][1:2] + tuple(kernel))
        if "hada_w1_a" in s and "hada_t1" not in s:
            return s["hada_w1_a"][0], s["hada_w1_b"][1]
        if "diff" in s:
            return s["diff"][0], _product(s["diff"][1:])
        return None


def _product(sides: tuple[int, ...]) -> int:
    whole = 1
    for side in sides:
        whole *= side
    return whole


@dataclass(frozen=True)
class LoraFile:
    """A file of which the header has been read. `changes` holds those of each part by module; `others` counts modules
    that the base does not have, `first_other` is a key of the first one."""

    path: Path
    changes: dict[str, dict[str, Change]]
    others: dict[str, int]
    first_other: str
    alphas: Mapping[str, Any] = field(default_factory=dict)
    """Settings of peft by part: lora_alpha, alpha_pattern, use_rslora."""

    def count(self) -> str:
        """`unet 12 of 12, text_encoder 0 of 3`: modules applied, of those in the file."""
        parts = [part for part in Parts.NAMES if self.changes.get(part) or self.others.get(part)]
        applied = {part: len(self.changes.get(part, {})) for part in parts}
        return ", ".join(f"{part} {applied[part]} of {applied[part] + self.others.get(part, 0)}" for part in parts)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their keys. Raises ModelError for what cannot be read or is not finite."""
        wanted = [key for part in self.changes.values() for one in part.values() for key in one.keys.values()]
        state = read_tensors(self.path, wanted)
        check_finite(state, self.path)
        return state

    def scaling(self, part: str, change: Change, alpha: Tensor | None) -> float:
        """What the change of a module is multiplied by: alpha / rank. Without alpha it is 1; LoKr of whole matrices
        has no rank, and is not scaled."""
        if change.method == "full" or (change.method == "LoKr" and {"lokr_w1", "lokr_w2"} <= change.keys.keys()):
            return 1.0
        settings = self.alphas.get(part, {})
        own = alpha.item() if alpha is not None else _setting(settings, change.module, change.rank)
        return own / (change.rank**0.5 if settings.get("use_rslora") else change.rank)


def _setting(settings: Mapping[str, Any], module: str, default: float) -> float:
    """The alpha of a module in peft's settings: that of the first pattern that its name ends with, else of all."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        name = pattern.strip("^$")  # peft takes it for a regular expression; what trainers write are names
        if module == name or module.endswith(f".{name}"):
            return float(alpha)
    return float(settings.get("lora_alpha", default))


def open_lora(path: Path, parts: Parts, base_name: str) -> LoraFile:
    """Read the header of a LoRA, a file or a folder with one, for a base. Raises ModelError for what cannot be read, a
    method that is not known, another family, and a file of which nothing applies."""
    file = file_in(path, LORA_FILES)
    headers, metadata = read_header(file)
    found = _grouped(file, headers)

    changes: dict[str, dict[str, Change]] = {}
    others: dict[str, int] = {}
    first_other = ""
    for (part, name), keys in found.items():
        module = parts.module_named(part, name)
        if module is None:
            others[part] = others.get(part, 0) + 1
            first_other = first_other or next(iter(keys.values()))
            continue
        change = Change(module, keys, {what: headers[key].shape for what, key in keys.items()})
        first = next(iter(keys.values()))
        if module in changes.setdefault(part, {}):
            raise ModelError(f"{file}: {first}: holds two changes of one module", "download the file again")
        try:
            _check(file, part, change, parts, base_name)
        except IndexError:
            raise ModelError(f"{file}: {first}: tensors of too few dimensions", "download the file again") from None
        changes[part][module] = change
    changes = {part: of_part for part, of_part in changes.items() if of_part}
    if not changes:
        raise ModelError(
            f"{file}: 0 of its {len(found)} changes apply to base {base_name}, such as {first_other or 'none'}",
            "a LoRA for this base, or another --base",
        )
    return LoraFile(file, changes, others, first_other, _alphas(file, metadata))


def _grouped(file: Path, headers: Mapping[str, Header]) -> dict[tuple[str, str], dict[str, str]]:
    """(part, module as the file names it) -> keys by what their tensors are."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for key in headers:
        ending = next((end for end in sorted(ENDINGS, key=len, reverse=True) if key.endswith(end)), None)
        if ending is None:
            method = next((method for end, method in FOREIGN.items() if key.endswith(end)), None)
            if method:
                raise ModelError(f"{file}: holds {method} ({key})", "LoRA, LoCon, LoHa, LoKr and DoRA are read")
            unknown.append(key)
            continue
        prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
        name = key[len(prefix) : -len(ending)]
        if ending.startswith("_lora."):  # diffusers' processors of 2023: attn1.processor.to_q_lora.down.weight
            name = re.sub(r"to_out$", "to_out.0", name.replace(".processor.", "."))
        found.setdefault((PREFIXES[prefix], name), {})[ENDINGS[ending]] = key
    if not any(keys.keys() - {"alpha"} for keys in found.values()):
        raise ModelError(
            f"{file}: no LoRA: none of its {len(headers)} tensors is a change of a module"
            + (f", such as {unknown[0]}" if unknown else ""),
            f"controlnet models show {file} says what it is; learned words are given with --embedding",
        )
    if unknown:
        raise ModelError(
            f"{file}: {len(unknown)} keys of no known form, such as {unknown[0]}",
            "LoRA, LoCon, LoHa, LoKr, DoRA are read",
        )
    return found


def _check(file: Path, part: str, change: Change, parts: Parts, base_name: str) -> None:
    """Raises ModelError for a change that is not whole or does not fit its module."""
    if not change.method or ("down" in change.keys) != ("up" in change.keys):
        raise ModelError(f"{file}: {next(iter(change.keys.values()))} has no other half", "download the file again")
    if "dora" in change.keys and change.method != "DoRA":
        raise ModelError(f"{file}: holds {change.method} with DoRA's magnitudes", "DoRA is read with LoRA alone")
    weight = parts.weight(part, change.module)
    fits = (weight.shape[0], weight[0].numel())
    if change.shape not in (None, fits):
        families = parts.families_of(change.module, change.shape)
        raise ModelError(
            f"{file}: does not fit base {base_name}{families}: {next(iter(change.keys.values()))} is for a module of"
            f" {change.shape}, the base's is {fits}",
            "a LoRA for this base, or another --base",
        )


def _alphas(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings by part: from the file's metadata, where diffusers writes them, or from adapter_config.json."""
    config = file.parent / "adapter_config.json"
    if file.name == "adapter_model.safetensors" and config.is_file():
        return {"unet": read_json(config, "")}
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in object_or_empty(metadata.get("lora_adapter_metadata", "{}").encode()).items():
        part, _, key = name.partition(".")
        settings[part][key] = value
    return settings
