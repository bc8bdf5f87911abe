"""The stages in which `tiny` is trained: VAE, text encoder, base, ControlNets. Each resumes and is skipped when
finished; each begins with the network it is given, or with a new one."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import denoise
from controlnet.model.registry import TINY_HINT_WIDTHS
from controlnet.model.tiny.conditions import scenes_of
from controlnet.model.tiny.recipe import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    TOKENS,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
)
from controlnet.model.tiny.world.scenes import vary
from controlnet.model.tiny.world.shards import World
from controlnet.model.training.checkpoints import save_atomic
from controlnet.model.training.log import has_stopped
from controlnet.model.training.loop import LoopConfig, Progress, fit
from controlnet.model.training.objective import Batch, NoiseSchedule, control_gap, control_losses
from controlnet.model.training.precision import autocast
from controlnet.model.training.recorded import Recorded
from controlnet.preprocessors.errors import Exit
from torch import Tensor, nn

LATENT_NOISE = 0.05

Limit = dict[str, Any]
"""How long a stage trains: LoopConfig's `minutes` or `max_steps`."""


def end_if_stopped(folder: Path) -> None:
    """End the command if a signal stopped the training in a folder: what follows would begin with a half-trained
    network."""
    if has_stopped(folder):
        print("stopped; the same command goes on")
        sys.exit(Exit.INTERRUPTED)


def mark_of(network: nn.Module) -> str:
    """Eight characters that tell networks of other weights apart, for the names of what is made with them."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def randomness(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The generator of a step, where the tensors are: what a CPU draws for a large batch takes longer than the step
    on a GPU."""
    return torch.Generator(device).manual_seed(seed * 100_000_000 + step)


def train_vae(
    world: World,
    folder: Path,
    limit: Limit,
    device: torch.device,
    vae: Any = None,
    batch: int = 16,
    crop: int = 64,
    report=print,
) -> tuple[nn.Module, Progress]:
    """Train the VAE. Loss: L1 + MSE + 0.5 L1 of the gradients on crops, with noise on the latents and a pull to unit
    statistics."""
    torch.manual_seed(0)
    vae = (vae or make_vae()).to(device, memory_format=torch.channels_last)
    images = world.images

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([1, step])
        rows = rng.integers(len(images), size=batch)
        corners = rng.integers(0, images.shape[1] - crop + 1, (batch, 2))
        crops = [images[r, y : y + crop, x : x + crop] for r, (y, x) in zip(rows, corners, strict=True)]
        crops = [c[:, ::-1] if rng.random() < 0.5 else c for c in crops]
        x = torch.from_numpy(np.stack(crops)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        places = (batch, LATENT_CHANNELS, crop // 8, crop // 8)
        return losses(x, torch.randn(places, generator=randomness(device, 1, step), device=device))

    def of_pictures(x: Tensor, noise: Tensor) -> Tensor:
        with autocast(device):
            z = vae.encode(x).latents
            y = vae.decode(z + LATENT_NOISE * noise).sample
        y, z = y.float(), z.float()
        gradients = sum((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for a, b in [(x, y)] for d in (2, 3))
        mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3))
        unit = mean.square().mean() + (deviation.clamp(min=1e-3).log()).square().mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * gradients + 0.01 * unit

    losses = Recorded(vae, of_pictures, say=report)
    # Muon reaches in 1,200 steps the loss that AdamW reaches in 5,000 (benchmarks/LOG.md).
    config = LoopConfig(**limit, optimizer="muon", learning_rate=2e-3, weight_decay=0.0)
    progress = fit(vae, loss_of, config, folder, report)
    return vae.eval(), progress


def encode_captions(tokenizer, captions: list[str]) -> Tensor:
    """(N, TOKENS) token ids, padded."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


@torch.no_grad()
def encode_images(vae: Any, images: np.ndarray, device: torch.device, batch: int = 64) -> Tensor:
    """(N, C, h, w) float16 latents, scaled as the UNet sees them."""
    latents = []
    for i in range(0, len(images), batch):
        x = torch.from_numpy(np.array(images[i : i + batch])).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast(device):
            z = vae.encode(x.contiguous(memory_format=torch.channels_last)).latents
        latents.append((z.float() * vae.config.scaling_factor).half().cpu())
    return torch.cat(latents)


def cached_latents(vae: Any, images: np.ndarray, path: Path, device: torch.device) -> Tensor:
    """All latents, from `path` if they are there; sets the VAE's scaling_factor so that they have unit deviation."""
    if not path.exists():
        deviation = float(encode_images(vae, images[:1000], device).float().std()) / vae.config.scaling_factor
        vae.register_to_config(scaling_factor=round(1 / deviation, 3))
        save_atomic({"factor": vae.config.scaling_factor, "latents": encode_images(vae, images, device)}, path)
    saved = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=saved["factor"])
    return saved["latents"]


def half_latents(vae: Any, images: np.ndarray, path: Path, device: torch.device, batch: int = 64) -> Tensor:
    """Latents of all pictures at half their size, (N, C, h / 2, w / 2), from `path` if they are there."""
    if not path.exists():
        side = images.shape[1] // 2
        parts = []
        for i in range(0, len(images), batch):
            small = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images[i : i + batch]]
            parts.append(encode_images(vae, np.stack(small), device))
        save_atomic(torch.cat(parts), path)
    return torch.load(path, weights_only=True)


def diffusion_batch(
    step: int, seed: int, latents: Tensor, batch: int, device: torch.device, among: np.ndarray | None = None
) -> tuple:
    """(generator, rows, z_0, eps, t) of a step, all drawn from (seed, step). Rows are among those in `among`, by
    default among all; the generator is for whatever else is random in the step."""
    rng = np.random.default_rng([seed, step])
    rows = rng.integers(len(latents if among is None else among), size=batch)
    rows = rows if among is None else among[rows]
    z0 = latents[torch.from_numpy(rows).to(latents.device)].to(device).float()
    eps = torch.randn(z0.shape, generator=randomness(device, seed, step), device=device)
    # One timestep from each of `batch` equal parts of the schedule: uniform, with less variance.
    t = torch.from_numpy((np.arange(batch) + rng.random(batch)) / batch * 1000).long().to(device)
    return rng, rows, z0, eps, t


def reworded(tokenizer, captions: list[str]) -> Tensor:
    """(4, N, TOKENS) token ids: every caption in four wordings."""
    rng = np.random.default_rng(2)
    return torch.stack([encode_captions(tokenizer, [vary(c, rng) for c in captions]) for _ in range(4)])


SKETCH = 8
"""Places along a side of the sketch that the text encoder learns to draw."""


class Sketch(nn.Module):
    """Text features (B, TOKENS, TEXT_WIDTH) -> the mean latent to expect from them, (B, C, 8, 8): a query for each
    place attends to the words, as the UNet's queries will."""

    def __init__(self, channels: int):
        super().__init__()
        self.queries = nn.Parameter(0.5 * torch.randn(SKETCH * SKETCH, TEXT_WIDTH))
        layer = nn.TransformerDecoderLayer(TEXT_WIDTH, 6, 2 * TEXT_WIDTH, 0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(TEXT_WIDTH))
        self.out = nn.Linear(TEXT_WIDTH, channels)

    def forward(self, text: Tensor) -> Tensor:
        places = self.out(self.decoder(self.queries.expand(len(text), -1, -1), text))
        return places.transpose(1, 2).unflatten(2, (SKETCH, SKETCH))


def train_text(
    latents: Tensor,
    captions: list[str],
    tokenizer,
    folder: Path,
    limit: Limit,
    device: torch.device,
    text_encoder: nn.Module | None = None,
    batch: int = 64,
    report=print,
) -> tuple[nn.Module, Progress]:
    """Train the text encoder alone, before the base, as Stable Diffusion's: it learns to predict what the picture looks
    like.

    With only the denoising loss it had hardly begun to learn after 190,000 samples (benchmarks/LOG.md).
    """
    torch.manual_seed(0)
    text_encoder = text_encoder or make_text_encoder(tokenizer)
    model = nn.ModuleDict({"text": text_encoder, "sketch": Sketch(latents.shape[1])}).to(device)
    wordings = reworded(tokenizer, captions)
    sketches = F.adaptive_avg_pool2d(latents.float(), SKETCH).to(device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([6, step])
        rows = torch.from_numpy(rng.integers(len(captions), size=batch))
        return losses(wordings[int(rng.integers(4)), rows].to(device), sketches[rows.to(device)])

    def of_words(ids: Tensor, truth: Tensor) -> Tensor:
        with autocast(device):
            y = model["sketch"](model["text"](ids).last_hidden_state)
        return F.mse_loss(y.float(), truth)

    losses = Recorded(model, of_words, say=report)

    config = LoopConfig(**limit, optimizer="muon", learning_rate=2e-3)
    progress = fit(model, loss_of, config, folder, report)
    return model["text"], progress


def train_base(
    latents: Tensor,
    captions: list[str],
    tokenizer,
    text_encoder: nn.Module,
    size: int,
    folder: Path,
    limit: Limit,
    device: torch.device,
    unet: nn.Module | None = None,
    batch: int = 64,
    report=print,
) -> tuple[nn.Module, nn.Module, Progress]:
    """Train UNet and text encoder together, on cached latents; one prompt in ten is empty, captions vary in wording."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"unet": unet or make_unet(size), "text": text_encoder})
    model.to(device).to(memory_format=torch.channels_last)
    schedule = NoiseSchedule(make_scheduler(), device)
    wordings = reworded(tokenizer, captions)
    empty = encode_captions(tokenizer, [""])

    def loss_of(step: int) -> Tensor:
        rng, rows, z0, eps, t = diffusion_batch(step, 3, latents, batch, device)
        ids = wordings[int(rng.integers(4)), torch.from_numpy(rows)]
        ids = torch.where(torch.from_numpy(rng.random((batch, 1)) < 0.1), empty, ids).to(device)
        return losses(ids, z0, eps, t)

    def of_noise(ids: Tensor, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        with autocast(device):
            text = model["text"](ids).last_hidden_state
            z = schedule.add_noise(z0, eps, t).contiguous(memory_format=torch.channels_last)
            prediction = denoise(model["unet"], z, t, Prompt(text))
        return schedule.loss(prediction, z0, eps, t).mean()

    losses = Recorded(model, of_noise, say=report)
    config = LoopConfig(**limit, optimizer="muon", learning_rate=4e-3)
    progress = fit(model, loss_of, config, folder, report)
    return model["unet"].eval(), model["text"].eval(), progress


def train_control(
    kind: str,
    unet: nn.Module,
    text_encoder: nn.Module,
    world: World,
    maps: np.ndarray,
    latents: Tensor,
    tokenizer,
    folder: Path,
    limit: Limit,
    device: torch.device,
    controlnet: ControlNet | None = None,
    batch: int = 32,
    report=print,
) -> tuple[ControlNet, Progress]:
    """Train a ControlNet on the locked base and the maps of `conditions.drawn` (empty where the limit
    is 0), with half of the prompts empty."""
    torch.manual_seed(0)
    controlnet = controlnet or ControlNet.from_base(unet, hint_widths=TINY_HINT_WIDTHS)
    controlnet.requires_grad_(True).to(device).to(memory_format=torch.channels_last)
    unet.requires_grad_(False), text_encoder.requires_grad_(False)
    schedule = NoiseSchedule(make_scheduler(), device)
    ids = encode_captions(tokenizer, world.captions)
    empty = encode_captions(tokenizer, [""])
    among = scenes_of(kind, world)

    # All randomness of a step comes from its number, so a resumed run repeats it.
    def of_batch(*tensors: Any) -> Tensor:
        with autocast(device):
            return control_losses(unet, controlnet, schedule, Batch.of(*tensors))

    losses = Recorded(controlnet, of_batch, say=report)

    def losses_of(batch: Batch) -> Tensor:
        return losses(*batch.tensors)

    def draw_batch(step: int, seed: int, count: int, emptied: float) -> Batch:
        rng, rows, z0, eps, t = diffusion_batch(step, seed, latents, count, device, among)
        empties = torch.from_numpy(rng.random((count, 1)) < emptied)
        with torch.no_grad(), autocast(device):
            text = text_encoder(torch.where(empties, empty, ids[torch.from_numpy(rows)]).to(device)).last_hidden_state
        chosen = maps[rng.integers(len(maps), size=count), np.searchsorted(among, rows)]
        condition = torch.from_numpy(chosen).to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float() / 255
        return Batch(z0, eps, t, Prompt(text), condition.contiguous(memory_format=torch.channels_last))

    def validate(progress: Progress) -> dict[str, float]:
        batch = draw_batch(0, 5, 64, 1.0)
        return control_gap(losses_of, [(batch, batch.condition.roll(1, 0))])

    looked = validate if len(maps) else None
    config = LoopConfig(**limit, optimizer="muon", learning_rate=2e-3, validate_every=250)
    progress = fit(controlnet, lambda k: losses_of(draw_batch(k, 4, batch, 0.5)).mean(), config, folder, report, looked)
    return controlnet.eval(), progress
