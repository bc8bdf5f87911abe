"""Where sampling begins, and what a start does at each step: from noise, or from a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor


class Start(Protocol):
    """Letters: B images, C channels of the latent, h w latent."""

    generators: list[torch.Generator] | None
    """One per image, for schedulers that add noise at each step."""

    def times(self, scheduler: SchedulerMixin) -> Tensor:
        """The timesteps that are made, of a scheduler whose timesteps are set; it is told where they begin."""

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        """z (B, C, h, w) at the first of these timesteps."""

    def model_input(self, z_t: Tensor) -> Tensor:
        """The UNet's input (B, C', h, w), from a scaled z_t."""

    def after(self, z: Tensor, done: int) -> Tensor:
        """z (B, C, h, w) to go on with after `done` steps."""


@dataclass
class FromNoise:
    """Text to image: noise (B, C, h, w), in the type that the latents shall have."""

    noise: Tensor
    generators: list[torch.Generator] | None = field(default=None)

    @classmethod
    def seeded(cls, seeds: list[int], shape: tuple[int, int, int]) -> FromNoise:
        """Float32 noise of shape (C, h, w) per seed, each from its own CPU generator, so that no image depends on the
        batch."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = [torch.randn((1, *shape), generator=generator) for generator in generators]
        return cls(torch.cat(noise), generators)

    def times(self, scheduler: SchedulerMixin) -> Tensor:
        return scheduler.timesteps

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        return self.noise.to(device) * scheduler.init_noise_sigma

    def model_input(self, z_t: Tensor) -> Tensor:
        return z_t

    def after(self, z: Tensor, done: int) -> Tensor:
        return z


def times_from(scheduler: SchedulerMixin, strength: float) -> Tensor:
    """The last timesteps of a scheduler whose timesteps are set: of its steps the share `strength`, rounded down. Empty
    if that is none (diffusers' img2img pipelines, `get_timesteps`)."""
    steps = scheduler.num_inference_steps
    skipped = (steps - min(int(steps * strength), steps)) * scheduler.order
    if skipped and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler.timesteps[skipped:]


@dataclass
class FromPicture(FromNoise):
    """Image to image (SDEdit, arXiv 2108.01073): latents z_0 (B, C, h, w) of pictures, noised to where the last share
    `strength` of the schedule begins."""

    z0: Tensor = field(default_factory=lambda: torch.empty(0))
    strength: float = 1.0

    def times(self, scheduler: SchedulerMixin) -> Tensor:
        return times_from(scheduler, self.strength)

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        begin = self.times(scheduler)[:1].to(device)
        return scheduler.add_noise(self.z0.to(device, self.noise.dtype), self.noise.to(device), begin)
