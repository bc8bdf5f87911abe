"""Where sampling begins, and what a start has to say at each step: from noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor


class Start(Protocol):
    """Letters: B images, C channels of the latent, h w latent."""

    generators: list[torch.Generator] | None
    """Of the images, for schedulers that add noise at each step."""

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        """z (B, C, h, w) at the first timestep of a scheduler whose timesteps are set."""

    def model_input(self, z_t: Tensor) -> Tensor:
        """What the UNet reads, (B, C', h, w), of a scaled z_t."""

    def after(self, z: Tensor, done: int) -> Tensor:
        """z (B, C, h, w) as it goes on when `done` steps are made."""


@dataclass
class FromNoise:
    """Text to image: noise (B, C, h, w), in the type of the latents to come."""

    noise: Tensor
    generators: list[torch.Generator] | None = field(default=None)

    @classmethod
    def seeded(cls, seeds: list[int], shape: tuple[int, int, int]) -> FromNoise:
        """Float32 noise of shape (C, h, w) for each seed, each image's from its own CPU generator, so that it does not
        depend on the batch."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = [torch.randn((1, *shape), generator=generator) for generator in generators]
        return cls(torch.cat(noise), generators)

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        return self.noise.to(device) * scheduler.init_noise_sigma

    def model_input(self, z_t: Tensor) -> Tensor:
        return z_t

    def after(self, z: Tensor, done: int) -> Tensor:
        return z
