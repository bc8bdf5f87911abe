"""Sampling: from noise to a latent under control, one loop for every scheduler of diffusers.

Letters: B images, h w latent, T tokens, D text width. The noise schedule and its update belong to the scheduler; the
guidance, the control and the noise of each image are here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from controlnet.model.controlnet import Control, ControlNet
from controlnet.model.strength import Strength
from controlnet.model.unet import Text, embed_time, predict
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
    cond = Text(text)
    both = Text(torch.cat([null_text.expand_as(text), text])) if null_text is not None and guided else cond  # 2B rows
    scheduler.set_timesteps(steps, device=unet.device)
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    times = scheduler.timesteps.to(unet.device)
    embeddings = {network: embed_time(network, times, unet.dtype) for network in (unet, *(c.net for c in controls))}
    z = noise.to(unet.device) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        z_t = scheduler.scale_model_input(z, t).to(unet.dtype).contiguous(memory_format=torch.channels_last)
        embedding = {network: rows[i : i + 1] for network, rows in embeddings.items()}
        control = None
        for one in controls:
            scale = one.strength.at(i, len(times))
            if scale != 0:  # else it need not run
                own = control_of(one, scale, z_t, embedding[one.net], both, cond)
                control = own if control is None else control + own
        eps = predict(unet, z_t, embedding[unet], both, control).to(z.dtype)
        if guided:
            eps_null, eps_text = eps.chunk(2)
            eps = eps_null + guidance * (eps_text - eps_null)
        z = scheduler.step(eps, t, z, **options, return_dict=False)[0]
        on_step(i + 1, len(times))
    return z


def control_of(one: Applied, scale: float, z: Tensor, embedding: Tensor, both: Text, cond: Text) -> Control:
    """The control of one ControlNet at z_t (B, 4, h, w). One that acts on the conditional half sees that half alone,
    and gives nothing to the other."""
    alone = one.strength.control_on == "cond"
    control = one.strength.apply(one.net.control(z, embedding, cond if alone else both, one.hint), scale)
    if alone and both is not cond:
        return Control([_after_zeros(r) for r in control.down], _after_zeros(control.middle))
    return control


def _after_zeros(residual: Tensor) -> Tensor:
    """(B, C, h, w) -> (2B, C, h, w): nothing for the unconditional half."""
    return torch.cat([torch.zeros_like(residual), residual])
