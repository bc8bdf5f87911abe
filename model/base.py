"""The base: the locked text-to-image model. It encodes texts and images, and decodes latents.

Every base takes the same path, `tiny` as well as SDXL: nothing here asks which one it is. `load.py` loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from controlnet.model.control.prompt import Prompt
from controlnet.model.engines.engine import Eager, Engine
from controlnet.model.text import TextEncoder, words_apart
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn


def inpainting_channels(latent: int) -> int:
    """What the UNet of an inpainting base reads for latents of so many channels: them, a mask, and the latents of the
    picture with its masked part grey (diffusers' inpainting pipelines)."""
    return 2 * latent + 1


def maps_weights(low_memory: bool, device: str | torch.device, engine: Engine) -> bool:
    """Whether weights are in a file and in memory only while their layer works: what `low_memory` means on a CPU. An
    engine that makes graphs keeps them otherwise."""
    return low_memory and torch.device(device).type == "cpu" and engine.name == "eager"


@dataclass
class Base:
    """A loaded base. Latents are (B, 4, H/8, W/8), images (B, 3, H, W) in [-1, 1]."""

    name: str
    path: Path
    """Its folder or single file."""
    unet: UNet2DConditionModel
    vae: Any
    encoders: list[TextEncoder]
    """Their features are joined along the width; the pooled text is the last one's."""
    scheduler: SchedulerMixin
    words: frozenset[str] | None
    """The words the text encoder was trained on, from words.txt in the tokenizer's folder; None without that file."""
    guidance: float
    control_on: str
    """The halves of the guidance that control acts on by default (modes.CONTROL_ON)."""
    device: torch.device
    sizes: tuple[tuple[int, int], ...] = ()
    """The canvases (width, height) it was trained on. Empty if it was trained on one size, `native_size`."""
    vae_path: Path | None = None
    """Where its VAE comes from, if that is not its own."""
    zeros_for_none: bool = False
    """Whether the features of no prompt at all are zeros, as SDXL was trained, and not those of the empty text."""
    distilled: str = ""
    """Why it seems to be distilled for few steps without guidance (Turbo, Lightning, ...); empty if it does not."""
    engine: Engine = field(default_factory=Eager)
    """What runs the networks in sampling."""
    low_memory: bool = False
    """Less memory, more time: each network is on the device only while it works (`maps_weights` on a CPU), images are
    made one at a time, and the VAE decodes large ones in tiles."""

    def __post_init__(self):
        self.scale = self.vae.config.scaling_factor
        self.shift = self.vae.config.get("shift_factor") or 0.0
        widths = self.vae.config.get("block_out_channels") or self.vae.config.decoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        """Pixels per latent cell: 8."""

    @property
    def channels(self) -> int:
        """Channels of the latents: 4 of Stable Diffusion's, 8 of `tiny`'s."""
        return self.unet.config.out_channels

    @property
    def is_inpainting(self) -> bool:
        """Whether the base reads a mask and what of the picture is outside of it, beside the latents."""
        return self.unet.config.in_channels == inpainting_channels(self.unet.config.out_channels)

    @property
    def native_size(self) -> int:
        """Side in pixels of the square images the base was trained on."""
        return self.unet.config.sample_size * self.factor

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def encode_text(
        self,
        prompts: Sequence[str | None],
        seconds: list[str] | None = None,
        clip_skip: int = 0,
        emphasis: bool = False,
    ) -> Prompt:
        """The prompt of B texts, without the ids of size and crop. None is no prompt at all (see `zeros_for_none`). A
        second encoder reads `seconds` if they are given, else the same texts. Words beyond the encoders' length are cut
        (`cut_words` returns them). `clip_skip` is the number of layers left out at the end of each encoder. With
        `emphasis` the texts may have weights, and be of any length (see emphasis.py)."""
        if emphasis:
            rows = zip(prompts, seconds if seconds is not None else repeat(None, len(prompts)), strict=True)
            return Prompt.cat([self._emphasised(first, second, clip_skip) for first, second in rows])
        features, pooled = [], None
        for i, encoder in enumerate(self.encoders):
            texts = seconds if i and seconds is not None else [text or "" for text in prompts]
            with self.at_work(encoder.network):
                c_t, pooled = encoder(texts, self.device, clip_skip)
            features.append(c_t.to(self.dtype))
        prompt = Prompt(torch.cat(features, -1), None if pooled is None else pooled.to(self.dtype))
        if not self.zeros_for_none or None not in prompts or seconds is not None:
            return prompt
        given = torch.tensor([text is not None for text in prompts], device=self.device)
        return prompt.map(lambda rows: rows * given.view(-1, *[1] * (rows.ndim - 1)))

    def _emphasised(self, first: str | None, second: str | None, clip_skip: int) -> Prompt:
        """A prompt of one row; all encoders read it in as many chunks."""
        if first is None:
            return self.encode_text([None], None if second is None else [second], clip_skip)
        texts = [second if i and second is not None else first for i in range(len(self.encoders))]
        most = max(len(encoder.chunks(text)) for encoder, text in zip(self.encoders, texts, strict=True))
        features, pooled = [], None
        for encoder, text in zip(self.encoders, texts, strict=True):
            with self.at_work(encoder.network):
                c_t, pooled = encoder.emphasised(text, self.device, clip_skip, most)
            features.append(c_t.to(self.dtype))
        return Prompt(torch.cat(features, -1), None if pooled is None else pooled.to(self.dtype))

    @property
    def has_size_ids(self) -> bool:
        """Whether the base is told sizes and crop (`size_ids`)."""
        return bool(self.unet.config.get("addition_embed_type"))

    def size_ids(
        self,
        size: tuple[int, int],
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target: tuple[int, int] | None = None,
    ) -> Tensor | None:
        """The ids (1, 6) float32 of a canvas (width, height) for a family with an added embedding, else None: height
        and width of the original picture, top and left of the crop, height and width of the target. `original` and
        `target` are (width, height), by default the canvas; `crop` is (left, top)."""
        if not self.has_size_ids:
            return None
        (width, height), (left, top), (wide, high) = original or size, crop, target or size
        return torch.tensor([[height, width, top, left, high, wide]], dtype=torch.float32, device=self.device)

    @property
    def text_encoder(self) -> Any:
        """The first encoder's network."""
        return self.encoders[0].network

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The first encoder's tokenizer."""
        return self.encoders[0].tokenizer

    @property
    def max_tokens(self) -> int:
        return min(encoder.max_tokens for encoder in self.encoders)

    def count_chunks(self, text: str) -> int:
        """In how many chunks a prompt with weights is read."""
        return max(len(encoder.chunks(text)) for encoder in self.encoders)

    def cut_words(self, prompt: str) -> str:
        """The end of the prompt that lies beyond the encoders' length, or ''."""
        return max((encoder.cut_words(prompt) for encoder in self.encoders), key=len)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that are not in `words`; none where that is None."""
        if self.words is None:
            return []
        learned = self.encoders[0].learned
        text = " ".join(part for part in words_apart(prompt, learned) if part.lower() not in learned)
        return [w for w in dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower())) if w not in self.words]

    def encode_image(self, images: Tensor) -> Tensor:
        """The VAE's moments of images (B, 3, H, W) in [-1, 1]: mean and log variance (B, 2C, h, w), or the latents
        themselves (B, C, h, w) if the VAE has no variance."""
        with self.at_work(self.vae):
            encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents

    def latent_of(self, picture: np.ndarray, hidden: np.ndarray | None = None) -> Tensor:
        """z_0 (1, C, h, w) float32 of a picture (H, W, 3) uint8: the mean of the VAE's posterior. Pixels that are
        `hidden` (H, W) are grey."""
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(self.device, torch.float32) / 127.5 - 1
        if hidden is not None:
            x = x * torch.from_numpy(~hidden).to(x)
        moments = self.encode_image(x).float()
        if not torch.isfinite(moments).all() and self.vae.dtype == torch.float16:
            with self._exact_vae():  # as in `decode`
                moments = self.encode_image(x)
        z0 = moments[:, : self.vae.config.latent_channels]
        return (z0 - self.shift) * self.scale

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """z_0 (B, C, h, w), scaled as the UNet sees it, drawn from moments with standard normal noise of z_0's
        shape."""
        mean, *spread = moments.chunk(2, 1) if moments.shape[1] == 2 * noise.shape[1] else (moments,)
        z = mean + (0.5 * spread[0].clamp(-30, 20)).exp() * noise if spread else mean
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the UNet predicts them -> images (B, 3, H, W) in [-1, 1], float32.

        Some VAEs leave the range of float16. Such an image is decoded in float32, and the next one is tried in float16
        again: no image depends on those before it.
        """
        latents = latents / self.scale + self.shift
        with self.at_work(self.vae):
            images = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
            if self.vae.dtype == torch.float16 and not torch.isfinite(images).all():
                with self._exact_vae():
                    images = self.vae.decode(latents.float()).sample
        return images.clamp(-1, 1)

    @contextmanager
    def _exact_vae(self) -> Iterator[None]:
        """The VAE in float32 and then in float16 again, with the weights that it had."""
        nn.Module.to(self.vae, torch.float32)
        try:
            yield
        finally:
            nn.Module.to(self.vae, torch.float16)

    @contextmanager
    def at_work(self, *networks: Any) -> Iterator[None]:
        """While the context lasts these networks are on the device. With low_memory they are on the CPU otherwise."""
        if self.low_memory:
            for network in networks:
                nn.Module.to(network, self.device)
        try:
            yield
        finally:
            if self.low_memory:
                for network in networks:
                    nn.Module.to(network, "cpu")

    def keep_on_device(self) -> None:
        """End `low_memory`: what is loaded goes to the device and stays there."""
        self.low_memory = False
        for network in (self.unet, self.vae, *(encoder.network for encoder in self.encoders)):
            if network is not None:
                nn.Module.to(network, self.device)

    def unload(self) -> None:
        """Free the memory of the VAE and the text encoders, which training needs only before its first step."""
        self.vae = None
        for encoder in self.encoders:
            encoder.network = None
