"""Models as people have them: folders in diffusers' layout, single files in the original one or in diffusers' names.

`open_model(path)` recognises what is there by its content and answers in diffusers' words: `config(part)` and
`state(part)`. Headers are read first, tensors only when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from controlnet.model.files import names
from controlnet.model.files.configs import completed
from controlnet.model.files.families import FAMILIES, VAE, Family, family_name, scheduler_config
from controlnet.model.files.tensors import (
    Header,
    is_safetensors,
    read_header,
    read_json,
    read_tensors,
    read_weights,
    weight_files,
)
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.files import is_dir, is_file
from controlnet.preprocessors.jsons import name_of, read_object
from torch import Tensor

STEMS = {
    "controlnet": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}  # fmt: skip
"""Parts, and the name of their weights in a folder."""
BASE_PARTS = ("unet", "vae", "text_encoder")
CONFIGS = "controlnet_toolkit.configs"
"""The key of a single file's metadata where `models convert` writes the configs, which the layout does not have."""
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Stored(Protocol):
    """A model on disk; `layout` says in words how it is stored."""

    path: Path

    @property
    def layout(self) -> str: ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of controlnet, unet, vae, text_encoder are there."""

    def config(self, part: str) -> dict[str, Any]:
        """Raises ModelError where the part is not there, or of no known family."""

    def headers(self, part: str) -> dict[str, Header]:
        """By the names of the file."""

    def state(self, part: str) -> dict[str, Tensor]:
        """By diffusers' names, of the text encoder without the prefix `text_model.`"""

    def prediction(self) -> str | None:
        """epsilon or v_prediction, as far as the files say."""

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config. Raises ModelError where nobody can know it."""


def open_model(path: Path) -> Stored:
    """What is at `path`. Raises ModelError for what is neither a base nor a ControlNet."""
    path = Path(path)
    if is_dir(path):
        return Folder(path)
    if not is_file(path):
        raise ModelError(f"{path}: no such file or folder", f"ls {path.parent}")
    return SingleFile(path)


@dataclass
class Folder:
    """Diffusers' layout: a ControlNet's config.json and weights, or a base's folder for each part."""

    path: Path

    @property
    def layout(self) -> str:
        first = self.parts[0]
        files = weight_files(self._folder(first), STEMS[first])
        kinds = ["diffusers folder", "pickle" if files[0].suffix == ".bin" else "safetensors"]
        kinds += ["sharded"] * (len(files) > 1) + ["fp16 variant"] * (".fp16." in files[0].name)
        others = sorted({f.suffix for f in files[0].parent.glob("*") if f.suffix in (".bin", ".safetensors")}
                        - {files[0].suffix})  # fmt: skip
        return ", ".join(kinds) + (f" (the {others[0]} beside it is not read)" if others else "")

    @property
    def parts(self) -> tuple[str, ...]:
        if (self.path / "model_index.json").is_file():
            return BASE_PARTS
        return ("controlnet",)

    def config(self, part: str) -> dict[str, Any]:
        if part not in self.parts:
            other = "a ControlNet" if part == "unet" else "a base"
            raise ModelError(f"{self.path}: {_said(part)} is expected here, and this is {other}", f"ls {self.path}")
        lone = sorted(f for f in self.path.glob("*") if f.suffix in (".safetensors", ".ckpt", ".pth"))
        if part == "controlnet" and lone and not (self.path / "config.json").is_file():
            raise ModelError(f"{self.path}: a folder without config.json", f"give the file itself: {lone[0]}")
        config = read_json(self._folder(part) / "config.json", f"the config of {_said(part)} in diffusers' layout")
        if part == "controlnet" and config.get("_class_name") != "ControlNetModel":
            raise ModelError(
                f"{self.path}: config.json describes {config.get('_class_name')}, expected a ControlNetModel"
            )
        return completed(config, str(config.get("_class_name")), self.path)

    def headers(self, part: str) -> dict[str, Header]:
        return {k: h for file in weight_files(self._folder(part), STEMS[part]) for k, h in read_header(file)[0].items()}

    def state(self, part: str) -> dict[str, Tensor]:
        state = read_weights(self._folder(part), STEMS[part])
        if part == "text_encoder":
            return _text_state(state)
        if part == "vae":  # files older than diffusers 0.18 call its attention's layers otherwise
            old = {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid_block.attentions.0.{b}"
                   for half in ("encoder", "decoder") for a, b in _OLD_VAE.items()}  # fmt: skip
            return {k: t for k, t in state.items() if k not in (found := names.rename(state, old))} | (
                names.linear_attention(found)
            )
        return state

    def prediction(self) -> str | None:
        path = self.path / "scheduler" / "scheduler_config.json"
        return _PREDICTIONS.get(read_json(path, "").get("prediction_type", "epsilon")) if path.is_file() else None

    def scheduler(self) -> dict[str, Any]:
        config = read_json(self.path / "scheduler" / "scheduler_config.json", "the scheduler's config")
        completed(config, str(config.get("_class_name")), self.path)
        return config

    def _folder(self, part: str) -> Path:
        return self.path if part == "controlnet" else self.path / part


@dataclass
class SingleFile:
    """One file: a base, a ControlNet, or both (the ControlNets of version 1.0)."""

    path: Path
    _headers: dict[str, Header] = field(init=False, repr=False)
    _metadata: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._headers, self._metadata = read_header(self.path)
        if not self.parts:
            first = next(iter(self._headers), "nothing")
            raise ModelError(
                f"{self.path}: neither a base nor a ControlNet: {_guess(self._headers)} (its first tensor: {first})",
                "a Stable Diffusion 1 or 2 base, or a ControlNet for one, as .safetensors, .ckpt or .pth",
            )

    @property
    def layout(self) -> str:
        own = "diffusers' names" if self._net_prefix is None and "controlnet" in self.parts else "original layout"
        return f"{own}, {'safetensors' if is_safetensors(self.path) else 'pickle'}"

    @property
    def parts(self) -> tuple[str, ...]:
        marks = {
            "controlnet": ("control_model.input_hint_block.0.weight", "input_hint_block.0.weight",
                           "controlnet_cond_embedding.conv_in.weight"),
            "unet": ("model.diffusion_model.input_blocks.0.0.weight",),
            "vae": ("first_stage_model.encoder.conv_in.weight",),
            "text_encoder": ("cond_stage_model.transformer.text_model.final_layer_norm.weight",
                             "cond_stage_model.transformer.final_layer_norm.weight",
                             "cond_stage_model.model.ln_final.weight"),
        }  # fmt: skip
        return tuple(part for part, marked in marks.items() if any(mark in self._headers for mark in marked))

    @property
    def _net_prefix(self) -> str | None:
        """Before the names of a ControlNet in the original layout; None for one in diffusers' names."""
        for prefix in ("control_model.", ""):
            if f"{prefix}input_hint_block.0.weight" in self._headers:
                return prefix
        return None

    def _prefix(self, part: str) -> str:
        if part == "text_encoder":
            return self._family.text_prefix
        prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
        return prefixes.get(part, self._net_prefix or "")

    @property
    def _written(self) -> dict[str, Any]:
        """The configs, where `models convert` wrote the file. Raises ModelError where they are none."""
        written = read_object(self._metadata.get(CONFIGS, "{}"), f"{self.path}: its metadata {CONFIGS}", ModelError)
        for part, config in written.items():
            if not isinstance(config, dict):
                raise ModelError(f"{self.path}: the config of its {part} is {name_of(config)}, expected a JSON object")
        return written

    @property
    def _family(self) -> Family:
        own = tuple(self._prefix(part) for part in ("unet", "controlnet") if part in self.parts)
        widths = [h.shape[1] for name, h in self._headers.items()
                  if name.startswith(own) and name.endswith("attn2.to_k.weight") and len(h.shape) == 2]  # fmt: skip
        width = widths[0] if widths else None
        if width not in FAMILIES:
            raise ModelError(
                f"{self.path}: {family_name(width)}; expected {' or '.join(f.name for f in FAMILIES.values())}",
                "a folder in diffusers' layout says of itself what it is: use that",
            )
        return FAMILIES[width]

    def config(self, part: str) -> dict[str, Any]:
        if part not in self.parts:
            raise ModelError(
                f"{self.path}: holds no {_said(part, '')}, only: {', '.join(map(_said, self.parts))}",
                "a whole model in one file, or a folder in diffusers' layout",
            )
        if part in self._written:
            config = self._written[part]
            return completed(config, str(config.get("_class_name")), self.path)
        if part == "vae":
            return dict(VAE)
        if part == "text_encoder":
            return dict(self._family.text_encoder)
        unet = dict(self._family.unet)
        first = "conv_in" if self._net_prefix is None and part == "controlnet" else "input_blocks.0.0"
        unet["in_channels"] = self._headers[f"{self._prefix(part)}{first}.weight"].shape[1]
        if part == "unet":
            if self.prediction() == "v_prediction":
                unet["sample_size"] = 96  # SD 2.x was trained at 768 pixels with it, at 512 with epsilon
            return unet
        unet = {k: v for k, v in unet.items() if k not in ("up_block_types", "sample_size", "out_channels")}
        return unet | {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": self._hint_widths()}

    def _hint_widths(self) -> list[int]:
        """Of the released encoder: its first convolution's outputs, then those of every second one but the last."""
        prefix = self._net_prefix
        hint = "controlnet_cond_embedding." if prefix is None else f"{prefix}input_hint_block."
        first = {"conv_in": -1, "conv_out": 99}
        convs = {}
        for name, header in self._headers.items():
            if name.startswith(hint) and name.endswith(".weight"):
                place = name.removeprefix(hint).removeprefix("blocks.").removesuffix(".weight")
                convs[first[place] if place in first else int(place)] = header.shape[0]
        return [convs[place] for place in sorted(convs)][:-1:2]

    def headers(self, part: str) -> dict[str, Header]:
        prefix = self._prefix(part)
        return {name: header for name, header in self._headers.items() if name.startswith(prefix)}

    def state(self, part: str) -> dict[str, Tensor]:
        config, prefix = self.config(part), self._prefix(part)
        state = {k.removeprefix(prefix): t for k, t in read_tensors(self.path, self.headers(part)).items()}
        if part == "controlnet" and self._net_prefix is None:
            return state
        if part == "text_encoder":
            return _text_state(from_open_clip(state, config) if prefix.endswith("model.") else state)
        table = {"unet": names.unet, "vae": names.vae, "controlnet": names.controlnet}[part](config)
        renamed = names.rename(state, table)
        if len(renamed) != len(state):
            unknown = sorted(set(state) - set(names.rename(renamed, names.reverse(table))))
            raise ModelError(f"{self.path}: {len(unknown)} unexpected tensors, among them {prefix}{unknown[0]}")
        return names.linear_attention(renamed) if part == "vae" else renamed

    def prediction(self) -> str | None:
        said = self._metadata.get("modelspec.prediction_type") or self._metadata.get("modelspec.predict_key") or ""
        return _PREDICTIONS.get(said.lower())

    def scheduler(self) -> dict[str, Any]:
        if "scheduler" in self._written:
            return dict(self._written["scheduler"])
        prediction = self.prediction() or ("epsilon" if self._family is FAMILIES[768] else None)
        if prediction is None:
            raise ModelError(
                f"{self.path}: the file does not say whether the model predicts epsilon or v",
                f"controlnet models convert {self.path} {self.path.stem} --to diffusers --prediction v_prediction"
                " (768-pixel models of SD 2.x; epsilon for 512-pixel ones)",
            )
        return scheduler_config(prediction)


def from_open_clip(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The text encoder of an SD 2 file; what diffusers does not keep (the last layer, the projection) left out."""
    position = state.pop("positional_embedding")
    renamed = names.rename(names.split_attention(state), names.open_clip(config))
    return renamed | {"embeddings.position_embedding.weight": position}


def to_open_clip(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The reverse."""
    position = {"positional_embedding": state["embeddings.position_embedding.weight"]}
    return position | names.join_attention(names.rename(state, names.reverse(names.open_clip(config))))


def _text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that transformers dropped in 5.6, and the ids 0..76, which are no weights."""
    bare = {k.removeprefix("text_model."): t for k, t in state.items()}
    return {k: t for k, t in bare.items() if not k.endswith("position_ids")}


def _said(part: str, article: str = "a ") -> str:
    words = {"controlnet": "ControlNet", "unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
    return article + words[part]


def _guess(headers: dict[str, Header]) -> str:
    known = (
        ("lora_", "a LoRA"), ("conditioner.embedders", "an SDXL base, which is not supported"),
        ("model.diffusion_model.joint_blocks", "an SD 3 base, which is not supported"),
        ("double_blocks", "a Flux model, which is not supported"),
        ("down_blocks.0.resnets", "the UNet of a base in diffusers' names, without its config"),
    )  # fmt: skip
    return next((what for mark, what in known if any(mark in name for name in headers)), "unknown names")
