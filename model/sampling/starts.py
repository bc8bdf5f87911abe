"""Where sampling begins, and what a start does at each step: from noise, from a picture, or in a part of one."""

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


@dataclass
class InMask(FromPicture):
    """Inpainting on any base: after each step, what lies outside of the mask is again the picture's z_0 as noisy as the
    next step expects (Avrahami et al. 2022, arXiv 2111.14818). With strength 1 it begins with noise alone."""

    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    """(B, 1, h, w): 1 where the picture is made anew, 0 where it stays."""

    def first(self, scheduler: SchedulerMixin, device: torch.device) -> Tensor:
        self.scheduler = scheduler
        self.mask, self.noise = self.mask.to(device, self.noise.dtype), self.noise.to(device)
        self.z0 = self.z0.to(device, self.noise.dtype)
        if self.strength == 1:
            return self.noise * scheduler.init_noise_sigma
        return super().first(scheduler, device)

    def after(self, z: Tensor, done: int) -> Tensor:
        left = self.times(self.scheduler)[done : done + 1].to(z.device)
        known = self.scheduler.add_noise(self.z0, self.noise, left) if len(left) else self.z0
        return known + self.mask * (z - known)


@dataclass
class ForInpainting(InMask):
    """Inpainting on a base that was made for it: its UNet reads the mask, and latents of the picture with the masked
    part grey, beside z_t (Rombach et al. 2022, section 4.5). It sees itself what stays."""

    shown: Tensor = field(default_factory=lambda: torch.empty(0))
    """(B, C, h, w): the latents of what is outside of the mask."""

    def model_input(self, z_t: Tensor) -> Tensor:
        rest = torch.cat([self.mask, self.shown.to(self.mask)], 1)
        return torch.cat([z_t, rest], 1)

    def after(self, z: Tensor, done: int) -> Tensor:
        return z
