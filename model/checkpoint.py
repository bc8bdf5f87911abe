"""ControlNet files in diffusers' layout: a folder with config.json and diffusion_pytorch_model.safetensors.

Our parameter names are diffusers' own, so a file is read as it is; only the config is translated. Weights are checked
before use: names, shapes, finite numbers. Pickles are read with weights_only, which runs no code in them.
"""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from controlnet.model.ablations import ControlNetLite
from controlnet.model.controlnet import ControlNet
from controlnet.preprocessors.errors import ModelError, OutputError
from controlnet.preprocessors.images import write_file
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model"
NET_FILES = ("config.json", f"{WEIGHTS}*.safetensors", f"{WEIGHTS}.safetensors.index.json")
"""What is fetched of a ControlNet's repository on the model hub."""
_FAMILY = ("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim")
"""What a base and its ControlNet must agree on."""
_UNET_KEYS = set(inspect.signature(UNet2DConditionModel.__init__).parameters)
_FILE_KEYS = set(inspect.signature(ControlNetModel.__init__).parameters) - {"self"}


def save_controlnet(controlnet: ControlNet, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights (in `dtype`, else as they are), each whole or not at all; diffusers'
    ControlNetModel loads the folder when the hint encoder is the released one. Raises OutputError."""
    folder = Path(folder)
    config = {k: v for k, v in controlnet.config.items() if k in _FILE_KEYS}
    config |= {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": list(controlnet.hint_widths)}
    if controlnet.hint != "released":
        config["hint_encoder"] = controlnet.hint
    if "copy" in controlnet.config:
        config["copy"] = controlnet.config["copy"]
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in controlnet.state_dict().items()}
    write_file(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    temporary = folder / f"{WEIGHTS}.safetensors.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", temporary)  # safetensors leaves it readable by its owner alone
        temporary.replace(folder / f"{WEIGHTS}.safetensors")
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{temporary}: cannot be written ({error})", "free some disk") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_controlnet(
    folder: Path, dtype: torch.dtype | None = None, base: Mapping | None = None, base_name: str = "the base"
) -> ControlNet:
    """The ControlNet of a folder, in evaluation mode, in `dtype` or as stored. With the config of a base's UNet, a net
    made for another family is refused before its weights are read.

    Raises ModelError for a missing or unreadable file, a config of something else, and weights whose names, shapes or
    numbers are wrong.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "a ControlNet in diffusers' layout")
    if config.get("_class_name") != "ControlNetModel":
        raise ModelError(f"{folder}: config.json describes {config.get('_class_name')}, expected a ControlNetModel")
    for key in _FAMILY:
        if base is not None and _plain(config.get(key)) != _plain(base[key]):
            raise ModelError(
                f"{folder} does not fit base {base_name}: its {key} is {config.get(key)}, the base's is {base[key]}",
                "choose a ControlNet made for this base, or another --base",
            )
    state = read_weights(folder, WEIGHTS)
    with torch.device("meta"):
        controlnet = _from_config(config, folder)
    check_state(controlnet, state, folder)
    controlnet.load_state_dict(state, assign=True)
    return controlnet.to(dtype).eval()


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def _from_config(config: dict, folder: Path) -> ControlNet:
    """The modules are those of a UNet2DConditionModel of the same config; its decoding half is thrown away."""
    unet_config = {k: v for k, v in config.items() if k in _UNET_KEYS and not k.startswith("_")}
    downs = config["down_block_types"]
    unet_config["up_block_types"] = tuple(name.replace("Down", "Up") for name in reversed(downs))
    try:
        unet = UNet2DConditionModel(**unet_config)
        parts = SimpleNamespace(
            config=config, conv_in=unet.conv_in, time_proj=unet.time_proj, time_embedding=unet.time_embedding,
            down_blocks=unet.down_blocks, mid_block=unet.mid_block,
        )  # fmt: skip
        network = ControlNetLite if config.get("copy") == "lite" else ControlNet
        return network(parts, config.get("hint_encoder", "released"), config["conditioning_embedding_out_channels"])
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: config.json does not describe a usable ControlNet: {error}") from error


def read_json(path: Path, what: str) -> dict:
    """A JSON object from a model folder. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"{path}: missing; expected {what}", f"ls {path.parent}")
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error


def read_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `stem`.safetensors, its shards, its fp16 variant, or `stem`.bin (weights only)."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index, "a shard index")["weight_map"].values()))
        return {name: tensor for file in files for name, tensor in _read_file(folder / file).items()}
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin"):
        if (folder / name).is_file():
            return _read_file(folder / name)
    raise ModelError(f"{folder}: no {stem}.safetensors", f"ls {folder}")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be read as weights ({error})", "download the file again") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: the pickle holds more than tensors; it was refused and nothing in it was run",
            "convert it to safetensors where you trust it, or find a .safetensors of the model",
        ) from error


def check_state(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Raises ModelError unless names, shapes and numbers of `state` fit `module`."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if missing := sorted(expected.keys() - state.keys()):
        raise ModelError(f"{source}: weights lack {len(missing)} tensors, among them {missing[0]}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ModelError(f"{source}: weights hold {len(unknown)} unexpected tensors, among them {unknown[0]}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(f"{source}: {name} has shape {tuple(state[name].shape)}, expected {shape}")
    check_finite(state, source)


def check_finite(state: dict[str, Tensor], source: Path) -> None:
    """Raises ModelError when a tensor holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{source}: {name} holds NaN or infinite numbers", "download or train the weights again")
