"""Loads a base from a folder in diffusers' layout, a single file, a name of the table or a hub id, and checks it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from controlnet.model.base import Base, inpainting_channels, maps_weights
from controlnet.model.control.unet import BLOCKS
from controlnet.model.control.upsampling import fold_upsampling
from controlnet.model.engines.engine import Eager, Engine
from controlnet.model.files import hub
from controlnet.model.files.families import SUPPORTED, Encoder, Family, family_of_config
from controlnet.model.files.layouts import open_model
from controlnet.model.files.stored import Stored
from controlnet.model.files.tensors import fill, read_json
from controlnet.model.files.tokenizer import load_tokenizer
from controlnet.model.files.vae import LoneVae
from controlnet.model.registry import BASES, KnownBase, check_base_name
from controlnet.model.text import TextEncoder
from controlnet.preprocessors.errors import ModelError, reason
from controlnet.preprocessors.log import LOG, doing
from diffusers import SchedulerMixin
from torch import Tensor, nn

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}


def find_base(name: str, offline: bool = False) -> Stored:
    """Find a base by its name in the registry, its folder, its file or its hub id. Reads no weights.

    Raises UsageError for an unknown name, ModelError for a folder that lacks a part or a file that is no base.
    """
    check_base_name(name)
    known = BASES.get(name)
    stored = open_model(hub.find(known.source if known else name, offline, "controlnet generate --base tiny"))
    if stored.path.is_dir():
        if not (stored.path / "model_index.json").is_file() and (stored.path / "config.json").is_file():
            what = read_json(stored.path / "config.json", "").get("_class_name")
            raise ModelError(f"{stored.path}: a {what}, expected a base", "ls " + str(stored.path))
        read_json(stored.path / "model_index.json", "a base in diffusers' layout")
        family = family_of_config(stored.config("unet"))
        _check_supported(stored, family)
        for part in (*family.parts, *family.tokenizers, "scheduler"):
            if not (stored.path / part).is_dir():
                raise ModelError(f"{stored.path}: the base has no folder {part}/", f"ls {stored.path}")
    return stored


def load_base(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    offline: bool = False,
    low_memory: bool = False,
    vae: str | None = None,
    engine_for: Callable[[int], Engine] = lambda parameters: Eager(),
) -> Base:
    """Load what `find_base` finds, with another VAE (a folder, a file or a hub id) if one is named. `engine_for` gives
    the engine for a UNet of so many parameters. Raises as `find_base` does, and ModelError for unusable weights."""
    # What is there, and whether it fits together, before anything large is read.
    stored = find_base(name, offline)
    known = BASES.get(name, KnownBase("", "", ""))
    own_vae = _vae(stored, vae, offline)
    _check_fit(stored, own_vae.config("vae"))
    words = stored.path / "tokenizer" / "words.txt"
    family = family_of_config(stored.config("unet"))

    engine = engine_for(sum(math.prod(header.shape) for header in stored.headers("unet").values()))

    LOG.info("base %s: %s, %s, by %s", name, stored.path, family.name, engine.name)

    # The parts, on the CPU where they wait for their turn.
    home = "cpu" if low_memory else device
    load = partial(_load_network, device=home, dtype=dtype, low_memory=maps_weights(low_memory, device, engine))
    base = Base(
        name=name,
        path=stored.path,
        scheduler=_load_scheduler(stored),
        unet=load("unet", stored, engine=engine),
        engine=engine,
        vae=load("vae", own_vae, dtype=_vae_dtype(own_vae, family, dtype)),
        vae_path=own_vae.path if vae else None,
        distilled=_distilled(name, stored),
        encoders=[_load_encoder(one, stored, load) for one in family.encoders],
        words=frozenset(words.read_text().split()) if words.is_file() else None,
        guidance=family.guidance if known.guidance is None else known.guidance,
        control_on=known.control_on,
        device=torch.device(device),
        sizes=family.sizes,
        zeros_for_none=stored.none_is_zeros,
        low_memory=low_memory,
    )
    if len({encoder.max_tokens for encoder in base.encoders}) > 1:
        lengths = " and ".join(str(encoder.max_tokens) for encoder in base.encoders)
        raise ModelError(f"{stored.path}: its text encoders read {lengths} tokens, expected as many tokens of each")
    if low_memory:
        base.vae.enable_tiling()
    return base


_DISTILLED = ("turbo", "lightning", "lcm", "hyper", "distilled")


def _check_supported(stored: Stored, family: Family) -> None:
    if not family.supported:
        known = " or ".join(known.name for known in SUPPORTED)
        raise ModelError(f"{stored.path}: is a base of {family.name}, which is not supported", f"a base of {known}")


def with_vae(base: Base, vae: str, offline: bool = False) -> Base:
    """The same base, its networks shared, with another VAE. Raises ModelError for one that does not fit."""
    stored = open_model(base.path)
    own_vae = _vae(stored, vae, offline)
    home, maps = "cpu" if base.low_memory else base.device, maps_weights(base.low_memory, base.device, base.engine)
    dtype = _vae_dtype(own_vae, family_of_config(stored.config("unet")), base.dtype)
    network: Any = _load_network("vae", own_vae, home, dtype, low_memory=maps)
    if base.low_memory:
        network.enable_tiling()
    return replace(base, vae=network, vae_path=own_vae.path)


def _vae_dtype(vae: Stored | LoneVae, family: Family, dtype: torch.dtype) -> torch.dtype:
    """float32 in place of float16 for a VAE that says that it leaves its range, as SDXL's own does (diffusers'
    `force_upcast`, which it heeds for SDXL alone)."""
    leaves = family.added and vae.config("vae").get("force_upcast", False)
    return torch.float32 if leaves and dtype == torch.float16 else dtype


def has_vae(name: str, offline: bool = False) -> bool:
    """Whether a base has a VAE of its own; some single files have none."""
    return "vae" in find_base(name, offline).parts


def _vae(stored: Stored, vae: str | None, offline: bool) -> Stored | LoneVae:
    """The VAE of a base, or another one in its place. Raises ModelError where there is none."""
    own = "vae" in stored.parts
    if vae:
        place = hub.find(vae, offline, "--vae FILE")
        inside = place / "vae"  # of a whole base in diffusers' layout
        family = family_of_config(stored.config("unet"))
        return LoneVae(inside if inside.is_dir() else place, stored.config("vae") if own else family.vae)
    if not own:
        raise ModelError(f"{stored.path}: holds no VAE", "--vae FILE gives it one")
    return stored


def _check_fit(stored: Stored, vae: Mapping[str, Any]) -> None:
    """Raises ModelError when the parts of a base do not fit each other."""
    unet = stored.config("unet")
    family = family_of_config(unet)
    widths = [_width(stored, encoder.part) for encoder in family.encoders]
    _check_supported(stored, family)
    latent, read = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if read == 2 * latent:
        raise ModelError(
            f"{stored.path}: a base that edits pictures by instructions ({read} input channels), which is not supported"
            " yet",
            "the base of the same name that makes images from text alone",
        )

    for key in ("time_cond_proj_dim", "class_embed_type"):
        if unet.get(key):
            raise ModelError(
                f"{stored.path}: {key} of its UNet is {unet[key]!r}: its time embedding reads more than the time, which"
                " is not supported",
                "a base that makes images from text, such as sd15 with an LCM LoRA",
            )

    # What must be equal: latents of UNet and VAE, widths of text features.
    pairs = (
        ("in_channels", latent if read == inpainting_channels(latent) else read, "the VAE's latents have", latent),
        (
            "cross_attention_dim",
            unet.get("cross_attention_dim"),
            "the text encoder's width is" if len(widths) == 1 else "the text encoders' widths add up to",
            sum(widths),
        ),
    )
    # Blocks that the walk knows.
    strange = [
        kind for key in ("down_block_types", "up_block_types") for kind in unet.get(key, ()) if kind not in BLOCKS
    ]
    if strange:
        raise ModelError(f"{stored.path}: its UNet has {strange[0]}s; expected Stable Diffusion's: {', '.join(BLOCKS)}")
    side = unet.get("sample_size")
    if not isinstance(side, int) or side < 1:
        raise ModelError(f"{stored.path}: sample_size of its UNet is {side!r}, expected a number of latent cells")
    if not vae.get("scaling_factor", 1):
        raise ModelError(f"{stored.path}: scaling_factor of its VAE is {vae['scaling_factor']}, expected not 0")
    if family.added:
        # Pooled text, and six ids of size and crop.
        pooled = stored.config(family.encoders[-1].part).get("projection_dim", 512)
        own, per_id = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim") or 0
        if not isinstance(pooled, int) or own != pooled + 6 * per_id:
            raise ModelError(
                f"{stored.path}: projection_class_embeddings_input_dim of its UNet is {own}, expected {pooled} + 6 x"
                f" {per_id}: the pooled text's width and six ids of addition_time_embed_dim"
            )
    for key, own, what, other in pairs:
        if own != other:
            raise ModelError(
                f"{stored.path}: the UNet's {key} is {own}, but {what} {other}",
                "a base that makes images from text",
            )


def _distilled(name: str, stored: Stored) -> str:
    """Why a base seems to be distilled for few steps: a word in its name, or a scheduler as SD- and SDXL-Turbo have."""
    scheduler = stored.scheduler()
    if scheduler.get("timestep_spacing") == "trailing" and "Ancestral" in scheduler["_class_name"]:
        return "its scheduler is a Turbo's"
    words = re.split(r"[^a-z]+", Path(name).name.lower())
    return next((f"its name says {word}" for word in _DISTILLED if word in words), "")


def _width(stored: Stored, part: str) -> int:
    """Width of a text encoder's features."""
    width = stored.config(part).get("hidden_size", 512)
    if not isinstance(width, int):
        raise ModelError(f"{stored.path}: hidden_size of its {part} is {width!r}, expected a number")
    return width


def _load_network(
    part: str,
    stored: Stored | LoneVae,
    device,
    dtype: torch.dtype,
    engine: Engine | None = None,
    low_memory: bool = False,
) -> nn.Module:
    config = stored.config(part)
    architectures = config.get("architectures")
    name = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "?")
    if name not in _CLASSES[part]:
        raise ModelError(f"{stored.path}: its {part} is a {name}, expected {' or '.join(_CLASSES[part])}")
    with init_empty_weights(include_buffers=False):
        try:
            if part.startswith("text_encoder"):
                network = getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(config))
            else:
                network = getattr(diffusers, name).from_config(config)
        except Exception as error:  # the libraries raise a dozen types for a config that makes no network
            raise ModelError(f"{stored.path}: the config of its {part} is not usable: {reason(error)}") from error
    with doing(f"loading {part}"):
        state = stored.state(part)
        if part.startswith("text_encoder"):
            state = _with_prefix(state, network)
        whole = stored.path.is_dir() and not isinstance(stored, LoneVae)
        kept = {} if engine is None else engine.weights(network, stored.path, part, dtype)
        fill(network, state, stored.path / part if whole else stored.path, device, dtype, kept, low_memory)
    fold_upsampling(network)
    return network.requires_grad_(False).eval()


def _with_prefix(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A text encoder's tensors under the names this version of transformers uses: with `text_model.` or without."""
    known = network.state_dict()
    if not any(name.startswith("text_model.") for name in known):
        return state
    return {name if name in known else f"text_model.{name}": tensor for name, tensor in state.items()}


def _load_encoder(encoder: Encoder, stored: Stored, load: Callable[[str, Stored], nn.Module]) -> TextEncoder:
    with TemporaryDirectory() as spare:
        tokenizer = load_tokenizer(stored.tokenizer(encoder.tokenizer, Path(spare)))
    network = load(encoder.part, stored)
    return TextEncoder(encoder.part, network, tokenizer, encoder.skipped)


def _load_scheduler(stored: Stored) -> SchedulerMixin:
    config = dict(stored.scheduler())
    if config.get("_class_name") == "DPMSolverSDEScheduler":  # its noise follows from no seed, and it needs torchsde
        config |= {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    name = str(config.get("_class_name"))
    scheduler: Any = getattr(diffusers, name, None)
    if "set_timesteps" not in dir(scheduler):  # what needs a package that is missing raises when it is asked
        raise ModelError(f"{stored.path}: unknown scheduler {name!r}")
    predicted = config.get("prediction_type", "epsilon")
    if predicted not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"{stored.path}: its scheduler's prediction_type is {predicted!r}, expected epsilon or v_prediction"
        )
    try:
        scheduler.from_config(config).set_timesteps(10)  # what is wrong with a schedule comes out here
        return scheduler.from_config(config)
    except Exception as error:  # the library raises a dozen types for a config that makes no schedule
        raise ModelError(f"{stored.path}: the config of its scheduler is not usable: {reason(error)}") from error


def reload(base: Base, *parts: str) -> None:
    """After `Base.unload`, load the VAE (`vae`) or the text encoders (`text_encoder`) of a base again, in float32."""
    stored = open_model(base.path)
    if "vae" in parts:
        own_vae = _vae(stored, str(base.vae_path) if base.vae_path else None, offline=True)
        base.vae = _load_network("vae", own_vae, base.device, torch.float32)
    if "text_encoder" in parts:
        for encoder in base.encoders:
            encoder.network = _load_network(encoder.part, stored, base.device, torch.float32)
