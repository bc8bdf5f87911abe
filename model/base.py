"""The base: the locked text-to-image model, loaded from a folder in diffusers' layout or by hub id.

`tiny` and Stable Diffusion take the same path; nothing here asks which one it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from controlnet.model.checkpoint import check_finite, read_json
from controlnet.model.registry import BASES
from controlnet.preprocessors.errors import ModelError, UsageError
from diffusers import SchedulerMixin, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}


@dataclass
class Base:
    """A loaded base. Latents are (B, 4, H/8, W/8), images (B, 3, H, W) in [-1, 1]."""

    name: str
    folder: Path
    unet: UNet2DConditionModel
    vae: Any
    text_encoder: Any
    tokenizer: transformers.PreTrainedTokenizerBase
    scheduler: SchedulerMixin
    words: frozenset[str] | None
    """The words that the text encoder was trained on, where the base's tokenizer folder has a words.txt."""
    guidance: float

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
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def encode_text(self, prompts: list[str]) -> Tensor:
        """c_t (B, T, D). Words beyond the encoder's length are cut; `cut_words` tells which."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.to(self.dtype)

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
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float().clamp(-1, 1)

    def unload(self) -> None:
        """Forget VAE and text encoder: training needs their memory and not them."""
        self.vae = self.text_encoder = None

    def reload(self, *parts: str) -> None:
        """Load `vae`, `text_encoder` or both again, in float32."""
        for part in parts:
            setattr(self, part, _load_network(part, self.folder, self.device, torch.float32))


def resolve(name: str, offline: bool, patterns: tuple[str, ...], example: str) -> Path:
    """The folder of a model: a folder as it is, or a hub id fetched into the hub's own cache."""
    if Path(name).is_dir():
        return Path(name)
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: no such folder, and not a hub id of the form OWNER/NAME", example)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=offline))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}: not on this machine, and the model hub "
            + ("was not asked (--offline)" if offline else "cannot be reached"),
            "with a network, run the same command once without --offline; or give a folder in diffusers' layout",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name}: the model hub has no such model, or it is not public", example) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{name}: could not be fetched from the model hub ({error})", "try again, or give a folder"
        ) from error


def load_base(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, offline: bool = False
) -> Base:
    """Load a base by its name in the registry, its folder or its hub id.

    Raises UsageError for an unknown name, ModelError for a folder that lacks a part or holds unusable weights.
    """
    known = BASES.get(name)
    patterns = tuple(f"{part}/*{end}" for part in COMPONENTS for end in (".json", ".txt", ".model")) + (
        "model_index.json", "unet/diffusion_pytorch_model*.safetensors", "vae/diffusion_pytorch_model*.safetensors",
        "text_encoder/model*.safetensors",
    )  # fmt: skip
    if known is None and not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
        raise UsageError(
            f"unknown base {name!r}: expected {', '.join(BASES)}, a folder in diffusers' layout or a hub id",
            'controlnet generate --base tiny --cond map.canny.png --prompt "..."',
        )
    folder = resolve(known.source if known else name, offline, patterns, "controlnet generate --base tiny ...")
    read_json(folder / "model_index.json", "a base in diffusers' layout")
    for part in COMPONENTS:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder}: the base has no folder {part}/", f"ls {folder}")
    tokenizer = _load("tokenizer", transformers.AutoTokenizer, folder)
    words = folder / "tokenizer" / "words.txt"
    base = Base(
        name=name,
        folder=folder,
        unet=_load_network("unet", folder, device, dtype),
        vae=_load_network("vae", folder, device, dtype),
        text_encoder=_load_network("text_encoder", folder, device, dtype),
        tokenizer=tokenizer,
        scheduler=_load_scheduler(folder),
        words=frozenset(words.read_text().split()) if words.is_file() else None,
        guidance=known.guidance if known else 7.5,
    )
    _check_fit(base)
    return base


def _check_fit(base: Base) -> None:
    """Raises ModelError when the parts of a base do not belong together."""
    unet, vae, text = base.unet.config, base.vae.config, base.text_encoder.config
    pairs = (
        ("in_channels", unet.in_channels, "the VAE's latents have", vae.latent_channels),
        ("cross_attention_dim", unet.cross_attention_dim, "the text encoder's width is", text.hidden_size),
    )
    for key, own, what, other in pairs:
        if own != other:
            raise ModelError(
                f"{base.folder}: the UNet's {key} is {own}, but {what} {other}",
                "a text-to-image base (not an inpainting or image-to-image one) in diffusers' layout",
            )


def _load_network(part: str, folder: Path, device, dtype: torch.dtype) -> nn.Module:
    config = read_json(folder / part / "config.json", f"the config of the base's {part}")
    name = config.get("_class_name") or (config.get("architectures") or ["?"])[0]
    if name not in _CLASSES[part]:
        raise ModelError(f"{folder / part}: class {name}, expected {' or '.join(_CLASSES[part])}")
    library = transformers if part == "text_encoder" else diffusers
    network = _load(part, getattr(library, name), folder).requires_grad_(False).eval()
    check_finite(network.state_dict(), folder / part)
    # Not from_pretrained's own flag: its name differs between the versions of the libraries.
    return nn.Module.to(network, device, dtype)


def _load_scheduler(folder: Path) -> SchedulerMixin:
    config = read_json(folder / "scheduler" / "scheduler_config.json", "the scheduler's config")
    scheduler = getattr(diffusers, str(config.get("_class_name")), None)
    if scheduler is None:
        raise ModelError(f"{folder / 'scheduler'}: unknown scheduler {config.get('_class_name')!r}")
    return scheduler.from_config(config)


def _load(part: str, cls, folder: Path, **options):
    """from_pretrained on a local folder; what it raises for broken files becomes a ModelError."""
    try:
        return cls.from_pretrained(folder / part, local_files_only=True, **options)
    except Exception as error:  # the libraries raise a dozen types for a broken file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder / part}: cannot be loaded: {reason[0]}", f"ls {folder / part}") from error
