"""Loads ControlNets from any layout in `files.layouts`, and saves them as folders in diffusers' layout.

Parameter names are diffusers' own; only the config is translated. Names, shapes and numbers of the weights are checked
before use.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from controlnet.model.control import t2i
from controlnet.model.control.controlnet import ControlNet, copied_parts, skip_channels
from controlnet.model.control.lite import ControlNetLite
from controlnet.model.control.union import ControlNetUnion
from controlnet.model.engines.engine import Eager, Engine
from controlnet.model.files.families import SD1, SDXL, family_name
from controlnet.model.files.layouts import open_model
from controlnet.model.files.stored import STEMS, T2I_CLASS, UNION_CLASS, Stored
from controlnet.model.files.tensors import fill, is_float8, write_tensors
from controlnet.preprocessors.errors import ModelError, reason
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.log import LOG
from diffusers import ControlNetModel, UNet2DConditionModel

NETWORKS: dict[str, type[ControlNet]] = {"full": ControlNet, "lite": ControlNetLite, "union": ControlNetUnion}
"""The networks that control. The key is the value of `copy` in their config and in the settings of a run; a union is
known by its class in diffusers."""
WEIGHTS = STEMS["controlnet"]
_FAMILY = (
    "cross_attention_dim", "addition_embed_type", "block_out_channels", "layers_per_block",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
"""Keys of the config that a base and its ControlNet must agree in. The number of attention blocks is not among them:
small ControlNets of SDXL leave some out."""
_UNET_KEYS = set(inspect.signature(UNet2DConditionModel.__init__).parameters)
_FILE_KEYS = set(inspect.signature(ControlNetModel.__init__).parameters) - {"self"}


def save_controlnet(controlnet: ControlNet, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights, in `dtype` if it is given. A file is written whole or not at all. If the hint
    encoder is the released one, diffusers' ControlNetModel loads the folder. Raises OutputError."""
    folder = Path(folder)
    config = {k: v for k, v in controlnet.config.items() if k in _FILE_KEYS}
    config |= {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": list(controlnet.hint_widths)}
    if controlnet.hint != "released":
        config["hint_encoder"] = controlnet.hint
    if "copy" in controlnet.config:
        config["copy"] = controlnet.config["copy"]
    # A ControlNet has no buffers; its state_dict would be shards where training has gathered them.
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in controlnet.named_parameters()}
    write_file(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    write_tensors(folder / f"{WEIGHTS}.safetensors", tensors)


def load_controlnet(
    path: Path, dtype: torch.dtype | None = torch.float32, base: Mapping | None = None, base_name: str = "the base"
) -> ControlNet:
    """`load_net`, of a ControlNet. Raises ModelError for another network as well."""
    net = load_net(path, dtype, base, base_name)
    if not isinstance(net, ControlNet):
        raise ModelError(f"{path}: a {type(net).__name__}, expected a ControlNet")
    return net


_EAGER = Eager()


def load_net(
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    base: Mapping | None = None,
    base_name: str = "the base",
    engine: Engine = _EAGER,
    low_memory: bool = False,
) -> Any:
    """Load the network of a folder or a single file, a `Net`, in evaluation mode, in `dtype` (None: as stored). If
    `base`, the config of a base's UNet, is given, one of another family is refused before its weights are read.
    `engine` is what will run it. With `low_memory` its weights are in memory only while a layer works.

    Raises ModelError for a missing or unreadable file, a config of something else, and weights whose names, shapes or
    numbers are wrong.
    """
    stored = open_model(Path(path))
    config = stored.config("controlnet")
    LOG.info("net %s", stored.path)
    if base is not None:
        check_family(stored, base, base_name)
    with torch.device("meta"):
        net = _built(config, stored.path)
    state = stored.state("controlnet")
    if dtype is None and any(is_float8(tensor) for tensor in state.values()):
        dtype = torch.float16  # nothing is computed in float8; float16 holds each of its numbers
    fill(net, state, stored.path, None, dtype, engine.weights(net, stored.path, "controlnet", dtype), low_memory)
    return net.eval()


def check_family(stored: Stored, base: Mapping, base_name: str) -> None:
    """Raises ModelError unless a stored ControlNet fits a UNet with the config `base`. Reads no weights."""
    form_of(stored.config("controlnet")).check(stored, base, base_name)


def _check_controlnet(stored: Stored, base: Mapping, base_name: str) -> None:
    config = stored.config("controlnet")
    latents = {"in_channels": base.get("out_channels")}  # a ControlNet reads nothing else, whatever the base does
    for key, own in [(key, base.get(key)) for key in _FAMILY] + list(latents.items()):
        if _plain(config.get(key)) != _plain(own):
            net, of_base = (family_name(c) for c in (config, base))
            families = f" ({net}, the base is {of_base})" if net != of_base else ""
            raise ModelError(
                f"{stored.path} does not fit base {base_name}{families}: its {key} is {config.get(key)}, the base's is"
                f" {own}",
                "choose a ControlNet made for this base, or another --base",
            )


def _check_t2i(stored: Stored, base: Mapping, base_name: str) -> None:
    config = stored.config("controlnet")
    of_xl = config["adapter_type"] == "full_adapter_xl"
    own, widths = _plain(config["channels"]), _plain(base.get("block_out_channels"))
    # The last feature of SDXL's is for the middle block; the light one's has the channels of the one before.
    downs = base.get("down_block_types") or ()
    plain = [not str(name).startswith("CrossAttn") for name in downs]  # its feature has the next block's size
    expected = [True] + [False] * (len(plain) - 1) if of_xl else [False] * (len(plain) - 1) + plain[-1:]
    per_block = {"full_adapter_xl": own[:-1], "light_adapter": [*own, *own[-1:]]}.get(config["adapter_type"], own)
    if not own or per_block != widths or plain != expected or of_xl != bool(base.get("addition_embed_type")):
        raise ModelError(
            f"{stored.path} does not fit base {base_name} ({family_name(base)}): a T2I-Adapter of"
            f" {SDXL.name if of_xl else SD1.name}, its channels are {own}, the base's {widths}",
            "choose one made for this base, or another --base",
        )


def connections_of(config: Mapping) -> int:
    """How many residuals a network with this config gives: one per skip connection, and the middle's; a T2I-Adapter's
    features."""
    return form_of(config).connections(dict(config))


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def _built(config: dict, path: Path) -> Any:
    """The network of a config, without weights."""
    try:
        return form_of(config).build(config)
    except Exception as error:  # the libraries raise a dozen types for a config that makes no network
        raise ModelError(f"{path}: the config does not describe a usable ControlNet: {reason(error)}") from error


def _build_controlnet(config: dict) -> ControlNet:
    """From the modules of a UNet2DConditionModel of the same config; its decoding half is dropped."""
    unet_config = {k: v for k, v in config.items() if k in _UNET_KEYS and not k.startswith("_")}
    downs = config["down_block_types"]
    unet_config["up_block_types"] = tuple(name.replace("Down", "Up") for name in reversed(downs))
    unet = UNet2DConditionModel(**unet_config)
    parts = SimpleNamespace(config=config, **{part: getattr(unet, part) for part in copied_parts(config)})
    form = "union" if config["_class_name"] == UNION_CLASS else config.get("copy", "full")
    network = NETWORKS.get(form, ControlNet)
    return network(parts, config.get("hint_encoder", "released"), config["conditioning_embedding_out_channels"])


@dataclass(frozen=True)
class Form:
    """A form of networks that control. To add one: its class, a `Net`, and its row in FORMS."""

    build: Callable[[dict], Any]
    """Its config -> the network, without weights."""
    check: Callable[[Stored, Mapping, str], None]
    """(stored network, config of a base's UNet, the base's name). Raises ModelError if they do not fit."""
    connections: Callable[[dict], int]
    """Its config -> how many residuals its Control has."""


CONTROLNETS = Form(_build_controlnet, _check_controlnet, lambda config: len(skip_channels(config)) + 1)
FORMS = {T2I_CLASS: Form(t2i.T2INet.from_config, _check_t2i, t2i.connections_of)}
"""By their class in diffusers, those that are no ControlNets."""


def form_of(config: Mapping) -> Form:
    return FORMS.get(config["_class_name"], CONTROLNETS)
