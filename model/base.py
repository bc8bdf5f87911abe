"""The base: the locked text-to-image model, loaded from a folder in diffusers' layout, a single file, or by hub id.

`tiny` and Stable Diffusion take the same path; nothing here asks which one it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import BLOCKS
from controlnet.model.files import hub
from controlnet.model.files.families import FAMILIES, MERGES, UNSUPPORTED, clip_vocabulary, family_name
from controlnet.model.files.layouts import BASE_PARTS, Stored, open_model
from controlnet.model.files.tensors import align, read_json
from controlnet.model.nets import check_state
from controlnet.model.registry import BASES, KnownBase, check_base_name
from controlnet.preprocessors.errors import ModelError, reason
from controlnet.preprocessors.files import write_file
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}


@dataclass
class Base:
    """A loaded base. Latents are (B, 4, H/8, W/8), images (B, 3, H, W) in [-1, 1]."""

    name: str
    path: Path
    """Its folder or single file."""
    unet: UNet2DConditionModel
    vae: Any
    text_encoder: Any
    tokenizer: transformers.PreTrainedTokenizerBase
    scheduler: SchedulerMixin
    words: frozenset[str] | None
    """The words that the text encoder was trained on, where the base's tokenizer folder has a words.txt."""
    guidance: float
    control_on: str
    """Its own way to apply control (modes.CONTROL_ON)."""
    device: torch.device
    low_memory: bool = False
    """Whether a network is on the device only while it works, pictures are made one at a time, and decoded in tiles
    where they are larger than the VAE was trained on."""

    @property
    def native_size(self) -> int:
        """Pixels of the side of a square picture as the base was trained."""
        return self.unet.config.sample_size * self.factor

    @property
    def factor(self) -> int:
        """Pixels a latent cell: 8."""
        widths = self.vae.config.get("block_out_channels") or self.vae.config.decoder_block_out_channels
        return 2 ** (len(widths) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def encode_text(self, prompts: list[str]) -> Prompt:
        """Of B texts. Words beyond the encoder's length are cut; `cut_words` tells which."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        with self.at_work(self.text_encoder):
            c_t = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state  # (B, T, D)
        return Prompt(c_t.to(self.dtype))

    @property
    def max_tokens(self) -> int:
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def cut_words(self, prompt: str) -> str:
        """The end of the prompt that lies beyond the encoder's length, or ''."""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[self.max_tokens - 2 :]).strip()

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the base never met in training, if it tells which it met."""
        if self.words is None:
            return []
        return [w for w in dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower())) if w not in self.words]

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], float32, of latents as the UNet gives them."""
        with self.at_work(self.vae):
            return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float().clamp(-1, 1)

    @contextmanager
    def at_work(self, *networks: Any) -> Iterator[None]:
        """Inside, these networks are on the device; with low_memory they are on the CPU before and after."""
        if self.low_memory:
            for network in networks:
                nn.Module.to(network, self.device)
        try:
            yield
        finally:
            if self.low_memory:
                for network in networks:
                    nn.Module.to(network, "cpu")

    def unload(self) -> None:
        """Forget VAE and text encoder: training needs their memory and not them."""
        self.vae = self.text_encoder = None

    def reload(self, *parts: str) -> None:
        """Load `vae`, `text_encoder` or both again, in float32."""
        for part in parts:
            setattr(self, part, _load_network(part, open_model(self.path), self.device, torch.float32))


def find_base(name: str, offline: bool = False) -> Stored:
    """A base by its name in the registry, its folder, its file or its hub id; none of its weights are read yet.

    Raises UsageError for an unknown name, ModelError for a folder that lacks a part or a file that is no base.
    """
    check_base_name(name)
    known = BASES.get(name)
    stored = open_model(hub.find(known.source if known else name, offline, "controlnet generate --base tiny"))
    if stored.path.is_dir():
        read_json(stored.path / "model_index.json", "a base in diffusers' layout")
        for part in COMPONENTS:
            if not (stored.path / part).is_dir():
                raise ModelError(f"{stored.path}: the base has no folder {part}/", f"ls {stored.path}")
    return stored


def load_base(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, offline: bool = False,
    low_memory: bool = False,
) -> Base:  # fmt: skip
    """Load what `find_base` finds. Raises as it does, and ModelError for unusable weights."""
    stored = find_base(name, offline)
    known = BASES.get(name, KnownBase("", "", ""))
    _check_fit(stored)
    words = stored.path / "tokenizer" / "words.txt"
    home = "cpu" if low_memory else device
    base = Base(
        name=name,
        path=stored.path,
        scheduler=_load_scheduler(stored),
        tokenizer=_load_tokenizer(stored),
        unet=_load_network("unet", stored, home, dtype),
        vae=_load_network("vae", stored, home, dtype),
        text_encoder=_load_network("text_encoder", stored, home, dtype),
        words=frozenset(words.read_text().split()) if words.is_file() else None,
        guidance=known.guidance,
        control_on=known.control_on,
        device=torch.device(device),
        low_memory=low_memory,
    )
    if low_memory:
        base.vae.enable_tiling()
    return base


def _check_fit(stored: Stored) -> None:
    """Raises ModelError when the parts of a base do not belong together."""
    unet, vae, text = (stored.config(part) for part in BASE_PARTS)
    if (family := family_name(unet.get("cross_attention_dim"))) in UNSUPPORTED.values():
        raise ModelError(f"{stored.path}: is a base of {family}, which is not supported yet", "a base of SD 1.x or 2.x")
    pairs = (
        ("in_channels", unet.get("in_channels", 4), "the VAE's latents have", vae.get("latent_channels", 4)),
        ("cross_attention_dim", unet.get("cross_attention_dim"), "the text encoder's width is",
         text.get("hidden_size", 512)),
    )  # fmt: skip
    strange = [
        kind for key in ("down_block_types", "up_block_types") for kind in unet.get(key, ()) if kind not in BLOCKS
    ]
    if strange:
        raise ModelError(f"{stored.path}: its UNet has {strange[0]}s; expected Stable Diffusion's: {', '.join(BLOCKS)}")
    for key, own, what, other in pairs:
        if own != other:
            raise ModelError(
                f"{stored.path}: the UNet's {key} is {own}, but {what} {other}",
                "a text-to-image base (not an inpainting or image-to-image one) of SD 1 or SD 2",
            )


def _load_network(part: str, stored: Stored, device, dtype: torch.dtype) -> nn.Module:
    config = stored.config(part)
    architectures = config.get("architectures")
    name = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "?")
    if name not in _CLASSES[part]:
        raise ModelError(f"{stored.path}: its {part} is a {name}, expected {' or '.join(_CLASSES[part])}")
    with init_empty_weights(include_buffers=False):
        try:
            if part == "text_encoder":
                network = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config))
            else:
                network = getattr(diffusers, name).from_config(config)
        except Exception as error:  # the libraries raise a dozen types for a config that makes no network
            raise ModelError(f"{stored.path}: the config of its {part} is not usable: {reason(error)}") from error
    state = stored.state(part)
    prefix = "text_model." if any(name.startswith("text_model.") for name in network.state_dict()) else ""
    state = {prefix + name: tensor for name, tensor in state.items()}
    check_state(network, state, stored.path / part if stored.path.is_dir() else stored.path)
    network.load_state_dict(state, assign=True)
    # Not the library's own `to`: diffusers' warns of types that its models keep.
    network = nn.Module.to(network.requires_grad_(False).eval(), device, dtype)
    nn.Module.to(network, memory_format=torch.channels_last)
    align(network)
    return network


def _load_scheduler(stored: Stored) -> SchedulerMixin:
    config = stored.scheduler()
    scheduler: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not hasattr(scheduler, "set_timesteps"):
        raise ModelError(f"{stored.path}: unknown scheduler {config.get('_class_name')!r}")
    predicted = config.get("prediction_type", "epsilon")
    if predicted not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"{stored.path}: its scheduler's prediction_type is {predicted!r}, expected epsilon or v_prediction"
        )
    try:
        return scheduler.from_config(config)
    except Exception as error:  # the library raises a dozen types for a config that makes no schedule
        raise ModelError(f"{stored.path}: the config of its scheduler is not usable: {reason(error)}") from error


def _load_tokenizer(stored: Stored) -> transformers.PreTrainedTokenizerBase:
    """The folder's own; for a single file CLIP's, which comes with this package."""
    if stored.path.is_dir():
        return _tokenizer(stored.path / "tokenizer")
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), stored.config("unet")["cross_attention_dim"])
        return _tokenizer(Path(folder))


def _tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises a dozen types for a broken file
        raise ModelError(f"{folder}: cannot be loaded: {reason(error)}", f"ls {folder}") from error
    if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 3:
        raise ModelError(f"{folder}: model_max_length is {tokenizer.model_max_length!r}, expected a number of tokens")
    return tokenizer


def write_tokenizer(folder: Path, cross_attention_dim: int) -> None:
    """CLIP's tokenizer as a folder, padded as the family of this width pads."""
    merges = MERGES.read_text()
    end = "<|endoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": 77, "errors": "replace",
        "bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end,
        "pad_token": FAMILIES[cross_attention_dim].pad_token,
    }  # fmt: skip
    write_file(folder / "merges.txt", merges.encode())
    write_file(folder / "vocab.json", json.dumps(clip_vocabulary(merges), ensure_ascii=False).encode())
    write_file(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
