"""Sampling: from noise to a latent under control, one loop for every scheduler of diffusers.

Letters: B images, h w latent, T tokens, D text width. The noise schedule and its update belong to the scheduler; the
guidance, the control and the noise of each image are here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from controlnet.model.control.controlnet import Control, ControlNet
from controlnet.model.control.strength import Strength
from controlnet.model.control.unet import Text, embed_time, predict
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


def count_evaluations(scheduler: SchedulerMixin, steps: int) -> int:
    """How often the network is evaluated in so many steps: windows and schedules count these."""
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


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
    halves_apart: bool = False,
) -> Tensor:
    """Latents (B, 4, h, w) from noise (B, 4, h, w), in the noise's dtype.

    text is (B, T, D), null_text the same or (1, T, D). A hint of B images serves both guidance halves. With guidance 1,
    or null_text None, the unconditional half is not computed. halves_apart computes one after the other: less memory,
    and what they share twice. on_step is told the evaluations done and their number.
    """
    guided = null_text is not None and guidance != 1
    cond = Text(text)
    null = Text(null_text.expand_as(text)) if null_text is not None and guided else cond
    both = cond if halves_apart or not guided else Text(torch.cat([null.c_t, text]))  # 2B rows
    everywhere = [one for one in controls if one.strength.control_on != "cond"]
    scheduler.set_timesteps(steps, device=unet.device)
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    times = scheduler.timesteps.to(unet.device)
    embeddings = {network: embed_time(network, times, unet.dtype) for network in (unet, *(c.net for c in controls))}
    z = noise.to(unet.device) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        z_t = scheduler.scale_model_input(z, t).to(unet.dtype).contiguous(memory_format=torch.channels_last)
        at = {network: rows[i : i + 1] for network, rows in embeddings.items()}
        now = i, len(times)
        eps = predict(unet, z_t, at[unet], both, add_controls(controls, now, z_t, at, both, cond)).to(z.dtype)
        if guided and halves_apart:
            control = add_controls(everywhere, now, z_t, at, null, null)
            eps = torch.cat([predict(unet, z_t, at[unet], null, control).to(z.dtype), eps])
        if guided:
            eps_null, eps_text = eps.chunk(2)
            eps = eps_null + guidance * (eps_text - eps_null)
        z = scheduler.step(eps, t, z, **options, return_dict=False)[0]
        on_step(i + 1, len(times))
    return z


def add_controls(
    controls: list[Applied], now: tuple[int, int], z: Tensor, at: dict[Any, Tensor], both: Text, cond: Text
) -> Control | None:
    """The sum of the controls that act on z_t (B, 4, h, w) in evaluation i of n, `now`, for the rows of `both`; None
    when none does. `at` has the time embedding of each network. A ControlNet whose scale is 0 is not run. One that acts
    on the conditional half sees that half alone, and gives nothing to the other."""
    total = None
    for one in controls:
        scale = one.strength.at(*now)
        if scale == 0:
            continue
        alone = one.strength.control_on == "cond" and both is not cond
        control = one.strength.apply(one.net.control(z, at[one.net], cond if alone else both, one.hint), scale)
        if alone:
            control = Control([_after_zeros(r) for r in control.down], _after_zeros(control.middle))
        total = control if total is None else total + control
    return total


def _after_zeros(residual: Tensor) -> Tensor:
    """(B, C, h, w) -> (2B, C, h, w): nothing for the unconditional half."""
    return torch.cat([torch.zeros_like(residual), residual])
