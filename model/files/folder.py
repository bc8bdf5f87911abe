"""Diffusers' layout: a folder for each part of a base, or a ControlNet's config and weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.model.files import names
from controlnet.model.files.configs import completed
from controlnet.model.files.families import family_of
from controlnet.model.files.stored import BASE_PARTS, COMPONENTS, PREDICTIONS, STEMS, Stored, said, text_state
from controlnet.model.files.tensors import Header, read_header, read_json, read_weights, weight_files, write_tensors
from controlnet.model.files.tokenizer import write_tokenizer
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.files import beside, not_written, write_file
from torch import Tensor

_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"), "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
}  # fmt: skip


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
        others = sorted(
            {f.suffix for f in files[0].parent.glob("*") if f.suffix in (".bin", ".safetensors")} - {files[0].suffix}
        )
        return ", ".join(kinds) + (f" (the {others[0]} beside it is not read)" if others else "")

    @property
    def parts(self) -> tuple[str, ...]:
        if (self.path / "model_index.json").is_file():
            return BASE_PARTS
        return ("controlnet",)

    def config(self, part: str) -> dict[str, Any]:
        if part not in self.parts:
            other = "a ControlNet" if part == "unet" else "a base"
            raise ModelError(f"{self.path}: {said(part)} is expected here, and this is {other}", f"ls {self.path}")
        lone = sorted(f for f in self.path.glob("*") if f.suffix in (".safetensors", ".ckpt", ".pth"))
        if part == "controlnet" and lone and not (self.path / "config.json").is_file():
            raise ModelError(f"{self.path}: a folder without config.json", f"give the file itself: {lone[0]}")
        config = read_json(self._folder(part) / "config.json", f"the config of {said(part)} in diffusers' layout")
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
            return text_state(state)
        if part == "vae":  # files older than diffusers 0.18 call its attention's layers otherwise
            old = {
                f"{half}.mid_block.attentions.0.{a}": f"{half}.mid_block.attentions.0.{b}"
                for half in ("encoder", "decoder")
                for a, b in _OLD_VAE.items()
            }
            return {k: t for k, t in state.items() if k not in (found := names.rename(state, old))} | (
                names.linear_attention(found)
            )
        return state

    def prediction(self) -> str | None:
        path = self.path / "scheduler" / "scheduler_config.json"
        return PREDICTIONS.get(read_json(path, "").get("prediction_type", "epsilon")) if path.is_file() else None

    def scheduler(self) -> dict[str, Any]:
        config = read_json(self.path / "scheduler" / "scheduler_config.json", "the scheduler's config")
        completed(config, str(config.get("_class_name")), self.path)
        return config

    def _folder(self, part: str) -> Path:
        return self.path if part == "controlnet" else self.path / part


def write_folder(stored: Stored, out: Path, scheduler: dict[str, Any] | None, prediction: str | None) -> None:
    """A model as a folder; one of a base and a ControlNet has the ControlNet in `controlnet`. `scheduler` is its
    scheduler's config, and `prediction` what it predicts, where that was said by hand. Raises OutputError when it
    cannot be written; then nothing is left of it."""
    if out.suffix in (".safetensors", ".ckpt", ".pth"):
        raise UsageError(f"{out}: diffusers' layout is a folder", f"--to original, or {out.with_suffix('')}")
    try:
        with beside(out) as temporary:
            _write(stored, temporary, scheduler, prediction)
    except OSError as error:
        raise not_written(out, error) from error


def _write(stored: Stored, folder: Path, scheduler: dict[str, Any] | None, prediction: str | None) -> None:
    is_base = "unet" in stored.parts
    if "controlnet" in stored.parts:
        net = folder / "controlnet" if is_base else folder
        _write_json(net / "config.json", stored.config("controlnet"))
        write_tensors(net / f"{STEMS['controlnet']}.safetensors", stored.state("controlnet"))
    if scheduler is None:
        return
    for part in BASE_PARTS:
        config = stored.config(part)
        if part == "unet" and prediction and stored.path.is_file():
            config["sample_size"] = 96 if prediction == "v_prediction" else 64
        state = stored.state(part)
        if part == "text_encoder":  # with the prefix of the public files: every version of transformers reads it
            state = {f"text_model.{name}": tensor for name, tensor in state.items()}
        _write_json(folder / part / "config.json", config)
        write_tensors(folder / part / f"{STEMS[part]}.safetensors", state)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if stored.path.is_dir():
        shutil.copytree(stored.path / "tokenizer", folder / "tokenizer", copy_function=shutil.copyfile)
        index = json.loads((stored.path / "model_index.json").read_text())
    else:
        family = family_of(stored.config("unet")["cross_attention_dim"], False)
        assert family is not None  # of a single file
        write_tokenizer(folder / "tokenizer", family.pad_token)
        index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        index |= {part: _CLASSES[part] for part in COMPONENTS if part in _CLASSES}
        index |= {"safety_checker": (None, None), "feature_extractor": (None, None)}
    _write_json(folder / "model_index.json", index | {"scheduler": ("diffusers", scheduler["_class_name"])})


def _write_json(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
