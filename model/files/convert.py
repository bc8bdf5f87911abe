"""One model, two layouts: diffusers' folders and the original single files, in both directions.

Tensors keep numbers and types. What a single file holds beside the networks (averaged weights of training, tables of
the noise schedule, OpenCLIP's last layer, which SD 2 never reads) is not carried over.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from controlnet.model.base import COMPONENTS, write_tokenizer
from controlnet.model.files import names
from controlnet.model.files.families import FAMILIES, SD2, scheduler_config
from controlnet.model.files.layouts import BASE_PARTS, CONFIGS, STEMS, Stored, open_model, to_open_clip
from controlnet.model.files.tensors import write_tensors
from controlnet.model.nets import WEIGHTS
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.files import beside, not_written, write_file
from torch import Tensor

_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"), "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
}  # fmt: skip
LAYOUTS = ("diffusers", "original")


def convert(source: Path, out: Path, to: str, prediction: str | None = None) -> None:
    """Write the model at `source` to `out`: a folder for `diffusers`, a .safetensors file for `original`. A file with a
    base and a ControlNet becomes the base's folder with the ControlNet's in it, `controlnet`.

    Raises ModelError for what cannot be converted, UsageError for a wrong `out`, OutputError when it cannot be written;
    then nothing is left of it.
    """
    stored = open_model(source)
    if to == "original":
        if out.suffix != ".safetensors":
            raise UsageError(
                f"{out}: the original layout is written as one .safetensors file", f"{out.stem}.safetensors"
            )
        write_tensors(out, *_original(stored, prediction))
        return
    if out.suffix in (".safetensors", ".ckpt", ".pth"):
        raise UsageError(f"{out}: diffusers' layout is a folder", f"--to original, or {out.with_suffix('')}")
    try:
        with beside(out) as temporary:
            _write_folder(stored, temporary, prediction)
    except OSError as error:
        raise not_written(out, error) from error


def _write_folder(stored: Stored, folder: Path, prediction: str | None) -> None:
    is_base = "unet" in stored.parts
    if "controlnet" in stored.parts:
        net = folder / "controlnet" if is_base else folder
        _write_json(net / "config.json", stored.config("controlnet"))
        write_tensors(net / f"{WEIGHTS}.safetensors", stored.state("controlnet"))
    if not is_base:
        return
    scheduler = _scheduler(stored, prediction)
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
        write_tokenizer(folder / "tokenizer", stored.config("unet")["cross_attention_dim"])
        index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        index |= {part: _CLASSES[part] for part in COMPONENTS if part in _CLASSES}
        index |= {"safety_checker": (None, None), "feature_extractor": (None, None)}
    _write_json(folder / "model_index.json", index | {"scheduler": ("diffusers", scheduler["_class_name"])})


def _original(stored: Stored, prediction: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a single file, and its metadata with the configs."""
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {part: stored.config(part) for part in stored.parts}
    if "unet" in configs:
        _check_original_base(stored, configs)
        configs["scheduler"] = _scheduler(stored, prediction)
    for part in stored.parts:
        tensors |= _original_part(part, configs[part], stored.state(part))
    metadata = {CONFIGS: json.dumps(configs, sort_keys=True)}
    if "scheduler" in configs:
        metadata["modelspec.prediction_type"] = configs["scheduler"].get("prediction_type", "epsilon")
    return tensors, metadata


def _original_part(part: str, config: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if part == "text_encoder":
        family = FAMILIES[config["hidden_size"]]
        state = to_open_clip(state, config) if family is SD2 else {f"text_model.{k}": t for k, t in state.items()}
        return {family.text_prefix + name: tensor for name, tensor in state.items()}
    if part == "controlnet" and (config.get("hint_encoder", "released") != "released" or config.get("copy") == "lite"):
        raise ModelError(
            "the original layout has no place for this ControlNet's"
            f" {'single convolutions' if config.get('copy') == 'lite' else 'hint encoder'}",
            "--to diffusers",
        )
    table = {"unet": names.unet, "vae": names.vae, "controlnet": names.controlnet}[part](config)
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "controlnet": "control_model."}[part]
    renamed = names.rename(state, names.reverse(table))
    if len(renamed) != len(state):
        raise ModelError(f"the {part} has {len(state) - len(renamed)} tensors that the original layout does not know")
    return {prefix + k: t for k, t in (names.convolution_attention(renamed) if part == "vae" else renamed).items()}


def _check_original_base(stored: Stored, configs: dict[str, Any]) -> None:
    kind = configs["vae"].get("_class_name")
    if kind != "AutoencoderKL":
        raise ModelError(
            f"{stored.path}: its VAE is an {kind}, which the original layout does not have", "--to diffusers"
        )
    if (width := configs["unet"].get("cross_attention_dim")) not in FAMILIES:
        raise ModelError(
            f"{stored.path}: text features of width {width}; expected"
            f" {' or '.join(f'{w} ({f.name})' for w, f in FAMILIES.items())}",
            "--to diffusers",
        )


def _scheduler(stored: Stored, prediction: str | None) -> dict[str, Any]:
    """As stored, or with another `prediction`."""
    if prediction is None:
        return stored.scheduler()
    if stored.path.is_dir():
        return stored.scheduler() | {"prediction_type": prediction}
    return scheduler_config(prediction)


def _write_json(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
