"""The base: the locked text-to-image model, and what is asked of it: texts and pictures encoded, latents decoded.

`tiny` and Stable Diffusion take the same path; nothing here asks which one it is. `load.py` loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from controlnet.model.control.prompt import Prompt
from controlnet.model.text import TextEncoder
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn


@dataclass
class Base:
    """A loaded base. Latents are (B, 4, H/8, W/8), images (B, 3, H, W) in [-1, 1]."""

    name: str
    path: Path
    """Its folder or single file."""
    unet: UNet2DConditionModel
    vae: Any
    encoders: list[TextEncoder]
    """Their features are read side by side; the last one's pooled text is the prompt's."""
    scheduler: SchedulerMixin
    words: frozenset[str] | None
    """The words that the text encoder was trained on, where the base's tokenizer folder has a words.txt."""
    guidance: float
    control_on: str
    """Its own way to apply control (modes.CONTROL_ON)."""
    device: torch.device
    sizes: tuple[tuple[int, int], ...] = ()
    """Canvases (width, height) that it was trained on; none: any whose shorter side is the native size."""
    low_memory: bool = False
    """Whether a network is on the device only while it works, pictures are made one at a time, and decoded in tiles
    where they are larger than the VAE was trained on."""

    def __post_init__(self):
        self.scale = self.vae.config.scaling_factor
        self.shift = self.vae.config.get("shift_factor") or 0.0
        widths = self.vae.config.get("block_out_channels") or self.vae.config.decoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        """Pixels per latent cell: 8."""

    @property
    def native_size(self) -> int:
        """Pixels of the side of a square picture as the base was trained."""
        return self.unet.config.sample_size * self.factor

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def encode_text(self, prompts: list[str], seconds: list[str] | None = None, clip_skip: int = 0) -> Prompt:
        """Of B texts, without the ids of size and crop. A second encoder reads `seconds`, if they are given. Words
        beyond the encoders' length are cut; `cut_words` gives them. `clip_skip` leaves out layers at their end."""
        features, pooled = [], None
        for i, encoder in enumerate(self.encoders):
            texts = seconds if i and seconds is not None else prompts
            with self.at_work(encoder.network):
                c_t, pooled = encoder(texts, self.device, clip_skip)
            features.append(c_t.to(self.dtype))
        return Prompt(torch.cat(features, -1), None if pooled is None else pooled.to(self.dtype))

    def size_ids(self, size: tuple[int, int]) -> Tensor | None:
        """What a family with an added embedding is told of a canvas (width, height), (1, 6) float32: the original
        picture's height and width, top and left of the crop, the canvas's height and width. None for other families."""
        if not self.unet.config.get("addition_embed_type"):
            return None
        width, height = size
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device)

    @property
    def text_encoder(self) -> Any:
        """The first encoder's network."""
        return self.encoders[0].network

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The first encoder's."""
        return self.encoders[0].tokenizer

    @property
    def max_tokens(self) -> int:
        return min(encoder.max_tokens for encoder in self.encoders)

    def cut_words(self, prompt: str) -> str:
        """The end of the prompt that lies beyond the encoders' length, or ''."""
        return max((encoder.cut_words(prompt) for encoder in self.encoders), key=len)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the base never met in training, as far as its folder lists them."""
        if self.words is None:
            return []
        return [w for w in dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower())) if w not in self.words]

    def encode_image(self, images: Tensor) -> Tensor:
        """Moments of the latents of images (B, 3, H, W) in [-1, 1]: mean and log variance (B, 2C, h, w), or of a VAE
        without variance the latents themselves (B, C, h, w)."""
        with self.at_work(self.vae):
            encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """z_0 (B, C, h, w) of moments, scaled as the UNet sees them; noise has z_0's shape and draws from the
        variance."""
        mean, *spread = moments.chunk(2, 1) if moments.shape[1] == 2 * noise.shape[1] else (moments,)
        z = mean + (0.5 * spread[0].clamp(-30, 20)).exp() * noise if spread else mean
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], float32, of latents as the UNet gives them.

        Some VAEs, SDXL's among them, leave float16's range: then this one goes on in float32.
        """
        latents = latents / self.scale + self.shift
        with self.at_work(self.vae):
            images = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
            if self.vae.dtype == torch.float16 and not torch.isfinite(images).all():
                nn.Module.to(self.vae, torch.float32)
                images = self.vae.decode(latents.float()).sample
        return images.clamp(-1, 1)

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
        """Forget VAE and text encoders: training needs their memory and not them."""
        self.vae = None
        for encoder in self.encoders:
            encoder.network = None
