"""Sampling: from noise to a latent under control, one loop for every scheduler of diffusers.

Letters: B images, h w latent, T tokens, D text width. The noise schedule and its update belong to the scheduler; the
guidance, the control and the noise of each image are here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from controlnet.model.controlnet import Control, ControlNet, denoise
from controlnet.model.strength import Strength
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor


@dataclass
class Applied:
    """A ControlNet at work: its hint feature, (1, C, h, w) for all images or (B, C, h, w), and how it acts."""

    net: ControlNet
    hint: Tensor
    strength: Strength = field(default_factory=Strength)


def draw_noise(seeds: list[int], shape: tuple[int, int, int]) -> tuple[Tensor, list[torch.Generator]]:
    """Noise (B, 4, h, w) float32, each image's from its own CPU generator, so that it does not depend on the batch.
    The generators go on to serve schedulers that add noise at each step."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = [torch.randn((1, *shape), generator=generator) for generator in generators]
    return torch.cat(noise), generators


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    noise: Tensor,
    text: Tensor,
    null_text: Tensor | None,
    controls: list[Applied],
    steps: int,
    guidance: float = 7.5,
    generators: list[torch.Generator] | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Latents (B, 4, h, w) from noise (B, 4, h, w), in the noise's dtype.

    text is (B, T, D), null_text the same or (1, T, D). A hint of B images serves both guidance halves. With guidance 1,
    or null_text None, the unconditional half is not computed. on_step is told the evaluations done and their number.
    """
    guided = null_text is not None and guidance != 1
    c_t = text if null_text is None or not guided else torch.cat([null_text.expand_as(text), text])  # (2B, T, D)
    scheduler.set_timesteps(steps, device=unet.device)
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    evaluations = len(scheduler.timesteps)
    z = noise.to(unet.device) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        z_t = scheduler.scale_model_input(torch.cat([z, z]) if guided else z, t).to(unet.dtype)
        times = t.to(z_t.device).expand(len(z_t))
        control = add_controls(controls, i, evaluations, z_t, times, c_t, guided)
        eps = denoise(unet, z_t, times, c_t, control).to(z.dtype)
        if guided:
            eps_null, eps_text = eps.chunk(2)
            eps = eps_null + guidance * (eps_text - eps_null)
        z = scheduler.step(eps, t, z, **options, return_dict=False)[0]
        on_step(i + 1, evaluations)
    return z


def add_controls(
    applied: list[Applied], i: int, evaluations: int, z: Tensor, t: Tensor, text: Tensor, guided: bool
) -> Control | None:
    """The sum of the controls that act in evaluation i; None when none does. A ControlNet whose scale is 0 is not run;
    one that acts on the conditional half alone sees that half alone."""
    total = None
    for one in applied:
        scale = one.strength.at(i, evaluations)
        if scale == 0:
            continue
        half = len(z) // 2 if guided and one.strength.control_on == "cond" else 0
        hint = one.hint if len(one.hint) == 1 else one.hint.repeat((len(z) - half) // len(one.hint), 1, 1, 1)
        control = one.strength.apply(one.net(z[half:], t[half:], text[half:], hint), scale)
        if half:
            control = Control([_after_zeros(r) for r in control.down], _after_zeros(control.middle))
        total = control if total is None else total + control
    return total


def _after_zeros(residual: Tensor) -> Tensor:
    """(B, C, h, w) -> (2B, C, h, w): nothing for the unconditional half."""
    return torch.cat([torch.zeros_like(residual), residual])
