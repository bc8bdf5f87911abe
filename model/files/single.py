"""The original layout: one file with a base, a ControlNet, or both (the ControlNets of version 1.0); or a ControlNet in
diffusers' names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from controlnet.model.files import names
from controlnet.model.files.configs import completed
from controlnet.model.files.families import (
    NONE_IS_ZEROS,
    SDXL,
    SUPPORTED,
    Family,
    family_by_width,
    family_name,
    family_of_config,
)
from controlnet.model.files.stored import (
    CONFIGS,
    NET_CLASS,
    PREDICTIONS,
    T2I_CLASS,
    UNION_CLASS,
    UNION_MARK,
    Stored,
    in_words,
    text_state,
)
from controlnet.model.files.strangers import stranger
from controlnet.model.files.tensors import Header, is_safetensors, read_header, read_tensors, write_tensors
from controlnet.model.files.tokenizer import write_tokenizer
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.jsons import name_of, read_object
from torch import Tensor

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "controlnet": "control_model."}
"""The prefix of each part's names. The text encoders' prefixes are in their families."""
NAMES = {"unet": names.unet, "vae": names.vae, "controlnet": names.controlnet}
"""Part -> function from a config to a table of names."""


@dataclass
class SingleFile:
    """One file: a base, a ControlNet, or both (the ControlNets of version 1.0)."""

    path: Path
    prediction_given: str | None = None
    """What the model predicts, if the caller said so."""
    _headers: dict[str, Header] = field(init=False, repr=False)
    _metadata: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._headers, self._metadata = read_header(self.path)
        refused = stranger(self._headers, with_parts=not self.parts)
        if refused or not self.parts:
            what = refused or f"unknown names (the first: {next(iter(self._headers), 'nothing')})"
            raise ModelError(
                f"{self.path}: neither a base nor a ControlNet: {what}",
                f"a base of {', '.join(f.name for f in SUPPORTED)}, or a ControlNet for one, as .safetensors, .ckpt or"
                " .pth",
            )

    @property
    def layout(self) -> str:
        own = "diffusers' names" if self._net_prefix is None and "controlnet" in self.parts else "original layout"
        return f"{own}, {'safetensors' if is_safetensors(self.path) else 'pickle'}"

    @property
    def parts(self) -> tuple[str, ...]:
        marks = {
            "controlnet": (
                "control_model.input_hint_block.0.weight",
                "input_hint_block.0.weight",
                "controlnet_cond_embedding.conv_in.weight",
            ),
            "unet": ("model.diffusion_model.input_blocks.0.0.weight",),
            "vae": ("first_stage_model.encoder.conv_in.weight",),
            "text_encoder": (
                "cond_stage_model.transformer.text_model.final_layer_norm.weight",
                "cond_stage_model.transformer.final_layer_norm.weight",
                "cond_stage_model.model.ln_final.weight",
                "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
            ),
            "text_encoder_2": ("conditioner.embedders.1.model.ln_final.weight",),
        }
        return tuple(part for part, marked in marks.items() if any(mark in self._headers for mark in marked))

    @property
    def _net_prefix(self) -> str | None:
        """The prefix of a ControlNet's names in the original layout; None if it has diffusers' names."""
        for prefix in ("control_model.", ""):
            if f"{prefix}input_hint_block.0.weight" in self._headers:
                return prefix
        return None

    def _prefix(self, part: str) -> str:
        if part.startswith("text_encoder"):
            return self.family.encoder(part).prefix
        return PREFIXES[part] if part != "controlnet" else self._net_prefix or ""

    @property
    def _written(self) -> dict[str, Any]:
        """The configs in the metadata, if `models convert` wrote the file. Raises ModelError if they are not
        configs."""
        written = read_object(self._metadata.get(CONFIGS, "{}"), f"{self.path}: its metadata {CONFIGS}", ModelError)
        for part, config in written.items():
            if not isinstance(config, dict):
                raise ModelError(f"{self.path}: the config of its {part} is {name_of(config)}, expected a JSON object")
        return written

    @property
    def family(self) -> Family:
        """The family, recognised by the headers. Raises ModelError for one that is not supported."""
        own = tuple(self._prefix(part) for part in ("unet", "controlnet") if part in self.parts)
        inside = {name: header for name, header in self._headers.items() if name.startswith(own)}
        widths = [h.shape[1] for n, h in inside.items() if n.endswith("attn2.to_k.weight") and len(h.shape) == 2]
        added = any(".label_emb." in f".{n}" or ".add_embedding." in f".{n}" for n in inside)
        width = widths[0] if widths else None
        family = family_by_width(width, added) if widths or not added else SDXL  # its small nets have no attention
        if family is None or not family.supported:
            found = family.name if family else family_name({"cross_attention_dim": width})
            known = " or ".join(f.name for f in SUPPORTED)
            raise ModelError(
                f"{self.path}: {found}; expected {known}",
                "a folder in diffusers' layout says of itself what it is: use that",
            )
        return family

    def config(self, part: str) -> dict[str, Any]:
        if part not in self.parts:
            raise ModelError(
                f"{self.path}: holds no {in_words(part, '')}, only: {', '.join(map(in_words, self.parts))}",
                "a ControlNet is expected here"
                if part == "controlnet"
                else "a whole base, or a folder in diffusers' layout",
            )
        if part in self._written:
            config = self._written[part]
            return completed(config, str(config.get("_class_name")), self.path)
        if part == "vae":
            return dict(self.family.vae)
        if part.startswith("text_encoder"):
            return dict(self.family.encoder(part).config)
        unet = dict(self.family.unet)
        first = "conv_in" if self._net_prefix is None and part == "controlnet" else "input_blocks.0.0"
        unet["in_channels"] = self._headers[f"{self._prefix(part)}{first}.weight"].shape[1]
        if part == "unet":
            unet["sample_size"] = self.family.sample_sizes.get(self.prediction() or "", unet["sample_size"])
            return unet
        unet = {k: v for k, v in unet.items() if k not in ("up_block_types", "sample_size", "out_channels")}
        net: dict[str, Any] = {"_class_name": NET_CLASS, "conditioning_embedding_out_channels": self._hint_widths()}
        # Nothing else tells of a shuffle network; A1111's web UI asks the same.
        net["global_pool_conditions"] = "shuffle" in self.path.name.lower()
        return unet | net | self._attention() | self._union()

    def _attention(self) -> dict[str, Any]:
        """Where a ControlNet in diffusers' names has attention, and how many layers of it: small nets have less."""
        if self._net_prefix is not None:
            return {}
        counts: dict[str, int] = {}  # block with attention -> its layers
        for name in self._headers:
            if found := re.match(r"(down_blocks\.\d+|mid_block)\.attentions\.0\.(?:transformer_blocks\.(\d+))?", name):
                counts[found[1]] = max(counts.get(found[1], 0), int(found[2] or -1) + 1)
        blocks = [f"down_blocks.{level}" for level in range(len(self.family.unet["down_block_types"]))]
        layers = [counts.get(block, 1) for block in blocks]
        if blocks[-1] not in counts:  # diffusers has one number for the last level and the middle
            layers[-1] = counts.get("mid_block", 1)
        attention = {
            "down_block_types": tuple("CrossAttnDownBlock2D" if b in counts else "DownBlock2D" for b in blocks),
            "transformer_layers_per_block": tuple(layers),
        }
        return attention if "mid_block" in counts else attention | {"mid_block_type": "UNetMidBlock2D"}

    def _union(self) -> dict[str, Any]:
        """What the config of a union says beside a ControlNet's, from its headers; nothing for another one."""
        if self._net_prefix is not None or UNION_MARK not in self._headers:
            return {}
        types, width = self._headers[UNION_MARK].shape
        layers = {name.split(".")[1] for name in self._headers if name.startswith("transformer_layes.")}
        return {
            "_class_name": UNION_CLASS,
            "num_control_type": types,
            "num_trans_channel": width,
            "num_trans_layer": len(layers),
            "num_trans_head": 8,
            "num_proj_channel": self._headers["spatial_ch_projs.weight"].shape[0],
        }

    def _hint_widths(self) -> list[int]:
        """Widths of the released hint encoder: the outputs of every second convolution, without the last."""
        prefix = self._net_prefix
        hint = "controlnet_cond_embedding." if prefix is None else f"{prefix}input_hint_block."
        outputs: dict[int, int] = {}  # by the convolution's place
        for name, header in self._headers.items():
            if not (name.startswith(hint) and name.endswith(".weight")):
                continue
            place = name.removeprefix(hint).removeprefix("blocks.").removesuffix(".weight")
            ends = {"conv_in": -1, "conv_out": 99}
            outputs[ends[place] if place in ends else int(place)] = header.shape[0]
        in_order = [outputs[place] for place in sorted(outputs)]
        return in_order[:-1:2]

    def headers(self, part: str) -> dict[str, Header]:
        prefix = self._prefix(part)
        return {name: header for name, header in self._headers.items() if name.startswith(prefix)}

    def state(self, part: str) -> dict[str, Tensor]:
        config, prefix = self.config(part), self._prefix(part)
        state = {k.removeprefix(prefix): t for k, t in read_tensors(self.path, self.headers(part)).items()}
        if part == "controlnet" and self._net_prefix is None:
            return state
        if part.startswith("text_encoder"):
            return text_state(from_open_clip(state, config) if self.family.encoder(part).open_clip else state)
        table = NAMES[part](config)
        renamed = names.rename(state, table)
        if len(renamed) != len(state):
            unknown = sorted(set(state) - set(names.rename(renamed, names.reverse(table))))
            raise ModelError(f"{self.path}: {len(unknown)} unexpected tensors, among them {prefix}{unknown[0]}")
        return names.linear_attention(renamed) if part == "vae" else renamed

    def prediction(self) -> str | None:
        if self.prediction_given:
            return self.prediction_given
        said = self._metadata.get("modelspec.prediction_type") or self._metadata.get("modelspec.predict_key") or ""
        return PREDICTIONS.get(said.lower())

    def tokenizer(self, name: str, spare: Path) -> Path:
        encoder = next(one for one in self.family.encoders if one.tokenizer == name)
        write_tokenizer(spare, encoder.pad_token)
        return spare

    def index(self) -> dict[str, Any]:
        return self.family.index | self._written.get("index", {})

    @property
    def none_is_zeros(self) -> bool:
        return bool(self.index().get(NONE_IS_ZEROS))

    def predicting(self, prediction: str) -> SingleFile:
        return replace(self, prediction_given=prediction)

    def scheduler(self) -> dict[str, Any]:
        if "scheduler" in self._written and not self.prediction_given:
            return dict(self._written["scheduler"])
        known = self.family.predictions
        prediction = self.prediction() or (known[0] if len(known) == 1 else None)
        if prediction is None:
            raise ModelError(
                f"{self.path}: the file does not say whether the model predicts epsilon or v",
                f"controlnet models convert {self.path} {self.path.stem} --to diffusers --prediction v_prediction"
                " (768-pixel models of SD 2.x; epsilon for 512-pixel ones)",
            )
        return self.family.scheduler(prediction)


def write_single(stored: Stored, out: Path) -> None:
    """Write a model as one file, with the configs in its metadata. Raises ModelError for a model that the layout has no
    place for, OutputError when it cannot be written; nothing of it is left then."""
    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: the original layout is written as one .safetensors file", f"{out.stem}.safetensors")
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {part: stored.config(part) for part in stored.parts}
    if "unet" in configs:
        _check_base(stored, configs)
        configs["scheduler"] = stored.scheduler()
        configs["index"] = {key: value for key, value in stored.index().items() if isinstance(value, bool)}
    family = family_of_config(configs.get("unet") or configs["controlnet"])
    for part in stored.parts:
        tensors |= _renamed(family, part, configs[part], stored.state(part))
    metadata = {CONFIGS: json.dumps(configs, sort_keys=True)}
    if "scheduler" in configs:
        metadata["modelspec.prediction_type"] = configs["scheduler"].get("prediction_type", "epsilon")
    write_tensors(out, tensors, metadata)


def _renamed(family: Family, part: str, config: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if part.startswith("text_encoder"):
        encoder = family.encoder(part)
        state = to_open_clip(state, config) if encoder.open_clip else {f"text_model.{k}": t for k, t in state.items()}
        return {encoder.prefix + name: tensor for name, tensor in state.items()}
    if part == "controlnet":
        _check_net(config)
    table = NAMES[part](config)
    prefix = PREFIXES[part]
    renamed = names.rename(state, names.reverse(table))
    if len(renamed) != len(state):
        raise ModelError(f"the {part} has {len(state) - len(renamed)} tensors that the original layout does not know")
    return {prefix + k: t for k, t in (names.convolution_attention(renamed) if part == "vae" else renamed).items()}


def _check_net(config: dict[str, Any]) -> None:
    """Raises ModelError for a ControlNet with a part that the layout has no names for."""
    if config["_class_name"] == T2I_CLASS:
        raise ModelError("a T2I-Adapter's original layout is not written", "--to diffusers")
    strange = {
        "types of conditions": config.get("_class_name") == UNION_CLASS,
        "single convolutions": config.get("copy") == "lite",
        "hint encoder": config.get("hint_encoder", "released") != "released",
    }
    if part := next((part for part, there in strange.items() if there), None):
        raise ModelError(f"the original layout has no place for this ControlNet's {part}", "--to diffusers")


def _check_base(stored: Stored, configs: dict[str, Any]) -> None:
    kind = configs["vae"].get("_class_name")
    if kind != "AutoencoderKL":
        raise ModelError(
            f"{stored.path}: its VAE is an {kind}, which the original layout does not have", "--to diffusers"
        )
    width = configs["unet"].get("cross_attention_dim")
    family = family_by_width(width, bool(configs["unet"].get("addition_embed_type")))
    if family is None or not family.supported:
        raise ModelError(
            f"{stored.path}: text features of width {width}; expected"
            f" {' or '.join(f'{f.width} ({f.name})' for f in SUPPORTED)}",
            "--to diffusers",
        )


def from_open_clip(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """A text encoder's state, from OpenCLIP's names to diffusers'. Left out is what diffusers does not have: a last
    layer that the family never reads, and the projection if the config has none. The projection is a linear layer in
    some files, the transposed matrix in others."""
    found = {}
    if "positional_embedding" in state:
        found["embeddings.position_embedding.weight"] = state["positional_embedding"]
    if _projects(config) and "text_projection" in state:
        found["text_projection.weight"] = state["text_projection"].T.contiguous()
    elif _projects(config) and "text_projection.weight" in state:
        found["text_projection.weight"] = state["text_projection.weight"]
    return found | names.rename(names.split_attention(state), names.open_clip(config))


def to_open_clip(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The reverse of `from_open_clip`."""
    found = {"positional_embedding": state["embeddings.position_embedding.weight"]}
    if _projects(config):
        found["text_projection"] = state["text_projection.weight"].T.contiguous()
    return found | names.join_attention(names.rename(state, names.reverse(names.open_clip(config))))


def _projects(config: dict) -> bool:
    return config.get("architectures") == ["CLIPTextModelWithProjection"]
