"""Where sampling begins, and what a start does at each step. There is one start so far: noise."""

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

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        """z (B, C, h, w) at the first timestep of a scheduler whose timesteps are set."""

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

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        return self.noise.to(device) * scheduler.init_noise_sigma

    def model_input(self, z_t: Tensor) -> Tensor:
        return z_t

    def after(self, z: Tensor, done: int) -> Tensor:
        return z
