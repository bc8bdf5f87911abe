"""Diffusers' layout: a folder for each part of a base, or a ControlNet's config and weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from controlnet.model.files import names
from controlnet.model.files.configs import completed
from controlnet.model.files.families import NONE_IS_ZEROS, family_of_config
from controlnet.model.files.stored import (
    BASE_PARTS,
    NET_CLASS,
    PREDICTIONS,
    STEMS,
    T2I_CLASS,
    UNION_CLASS,
    UNION_MARK,
    Stored,
    in_words,
    public_text_state,
    text_state,
)
from controlnet.model.files.tensors import (
    Header,
    read_header,
    read_json,
    read_weights,
    weight_files,
    weights_among,
    write_tensors,
)
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.files import beside, not_written, write_file
from torch import Tensor

_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Folder:
    """Diffusers' layout: a ControlNet's config.json and weights, or a base's folder for each part."""

    path: Path
    prediction_given: str | None = None
    """What the model predicts, if the caller said so."""

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
            index = self.index()
            return tuple(part for part in BASE_PARTS if part in index or part != "text_encoder_2")
        return ("controlnet",)

    def config(self, part: str) -> dict[str, Any]:
        if part not in self.parts:
            other = "a ControlNet" if part == "unet" else "a base"
            raise ModelError(f"{self.path}: {in_words(part)} is expected here, and this is {other}", f"ls {self.path}")
        lone = sorted(f for f in self.path.glob("*") if f.suffix in (".safetensors", ".ckpt", ".pth"))
        if part == "controlnet" and lone and not (self.path / "config.json").is_file():
            raise ModelError(f"{self.path}: a folder without config.json", f"give the file itself: {lone[0]}")
        config = read_json(self._folder(part) / "config.json", f"the config of {in_words(part)} in diffusers' layout")
        if part == "controlnet":
            config = self._net_config(config)
        return completed(config, str(config.get("_class_name")), self.path)

    def _net_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A ControlNet's config. A union's own config may call it a plain one, or have another number of types than its
        weights: the weights decide."""
        name = config.get("_class_name")
        if name == T2I_CLASS:
            return config
        if not str(name).startswith("ControlNet"):
            raise ModelError(f"{self.path}: config.json describes {name}, expected a {NET_CLASS}")
        here = weights_among((path.name for path in self.path.glob("*")), STEMS["controlnet"])
        mark = self.headers("controlnet").get(UNION_MARK) if here else None
        if mark is None and (here or name == NET_CLASS):
            if name != NET_CLASS:
                raise ModelError(f"{self.path}: config.json describes {name}, but the weights are not a union's")
            return config
        return config | {"_class_name": UNION_CLASS} | ({"num_control_type": mark.shape[0]} if mark else {})

    def headers(self, part: str) -> dict[str, Header]:
        return {k: h for file in weight_files(self._folder(part), STEMS[part]) for k, h in read_header(file)[0].items()}

    def state(self, part: str) -> dict[str, Tensor]:
        state = read_weights(self._folder(part), STEMS[part])
        if part.startswith("text_encoder"):
            return text_state(state)
        return renewed(state) if part == "vae" else state

    def prediction(self) -> str | None:
        if self.prediction_given:
            return self.prediction_given
        path = self.path / "scheduler" / "scheduler_config.json"
        return PREDICTIONS.get(read_json(path, "").get("prediction_type", "epsilon")) if path.is_file() else None

    def tokenizer(self, name: str, spare: Path) -> Path:
        return self.path / name

    def index(self) -> dict[str, Any]:
        return read_json(self.path / "model_index.json", "a base in diffusers' layout")

    @property
    def none_is_zeros(self) -> bool:
        family = family_of_config(self.config("unet"))
        return bool(self.index().get(NONE_IS_ZEROS, family.pipeline.get(NONE_IS_ZEROS)))

    def predicting(self, prediction: str) -> Folder:
        return replace(self, prediction_given=prediction)

    def scheduler(self) -> dict[str, Any]:
        config = read_json(self.path / "scheduler" / "scheduler_config.json", "the scheduler's config")
        completed(config, str(config.get("_class_name")), self.path)
        return config | ({"prediction_type": self.prediction_given} if self.prediction_given else {})

    def _folder(self, part: str) -> Path:
        return self.path if part == "controlnet" else self.path / part


def renewed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors under today's names: before diffusers 0.18 the layers of its attention had others."""
    table: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        attention = f"{half}.mid_block.attentions.0"
        table |= {f"{attention}.{old}": f"{attention}.{new}" for old, new in _OLD_VAE.items()}
    today = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in table}
    return today | names.linear_attention(names.rename(state, table))


def write_folder(stored: Stored, out: Path) -> None:
    """Write a model as a folder; if it is a base with a ControlNet, the ControlNet goes into its folder `controlnet`.
    Raises OutputError when it cannot be written; nothing of it is left then."""
    if out.suffix in (".safetensors", ".ckpt", ".pth"):
        raise UsageError(f"{out}: diffusers' layout is a folder", f"--to original, or {out.with_suffix('')}")
    scheduler = stored.scheduler() if "unet" in stored.parts else None  # what nobody knows is told before the work
    try:
        with beside(out) as temporary:
            if "controlnet" in stored.parts:
                _write_net(stored, temporary / "controlnet" if scheduler else temporary)
            if scheduler:
                _write_base(stored, temporary, scheduler)
    except OSError as error:
        raise not_written(out, error) from error


def _write_net(stored: Stored, folder: Path) -> None:
    _write_json(folder / "config.json", stored.config("controlnet"))
    write_tensors(folder / f"{STEMS['controlnet']}.safetensors", stored.state("controlnet"))


def _write_base(stored: Stored, folder: Path, scheduler: dict[str, Any]) -> None:
    for part in (part for part in stored.parts if part != "controlnet"):
        state = stored.state(part)
        if part.startswith("text_encoder"):
            state = public_text_state(state)
        _write_json(folder / part / "config.json", stored.config(part))
        write_tensors(folder / part / f"{STEMS[part]}.safetensors", state)
    for name in family_of_config(stored.config("unet")).tokenizers:
        with TemporaryDirectory() as spare:
            shutil.copytree(stored.tokenizer(name, Path(spare)), folder / name, copy_function=shutil.copyfile)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", stored.index() | {"scheduler": ("diffusers", scheduler["_class_name"])})


def _write_json(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
