"""Sampling: from a start to latents, under control. One loop for every scheduler of diffusers.

The scheduler owns the noise schedule and the update; guidance and control are here. Letters: B images, C channels of
the latent, h w latent.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from controlnet.model.control.control import Control
from controlnet.model.control.net import Feature, Net
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.strength import Strength
from controlnet.model.control.unet import embed_times
from controlnet.model.engines.engine import Eager, Engine
from controlnet.model.sampling.starts import Start, times_from
from controlnet.preprocessors.errors import UsageError, reason
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor

EAGER = Eager()


@dataclass
class ActiveNet:
    """A ControlNet at work: the feature of its condition, (B, C, h, w) or (1, C, h, w) for all images, and its
    strength."""

    net: Net
    feature: Feature
    strength: Strength = field(default_factory=Strength)
    type: int = 0
    """Of its condition, for networks that tell types apart."""


def count_evaluations(scheduler: SchedulerMixin, steps: int, strength: float = 1.0) -> int:
    """How often the UNet is evaluated in so many steps, of which a start from a picture makes the share `strength`.
    Windows and schedules count evaluations. Raises UsageError for more steps than the scheduler can make."""
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UsageError(f"--steps {steps}: {reason(error)}", "--steps 20, or another --scheduler") from error
    return len(times_from(scheduler, strength))


def passes_of(controls: Sequence[ActiveNet]) -> list[list[ActiveNet]]:
    """The conditions that each pass of a network takes. A union takes several at once if they differ in nothing but
    their scales and windows; every other network takes one."""
    passes: dict[Any, list[ActiveNet]] = {}
    for i, one in enumerate(controls):
        how = one.strength
        alike = (one.net, how.weighting, how.control_on, id(how.region)) if one.net.types else i
        passes.setdefault(alike, []).append(one)
    return list(passes.values())


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    start: Start,
    prompt: Prompt,
    negative: Prompt | None,
    controls: Sequence[ActiveNet],
    steps: int,
    guidance: float = 7.5,
    on_step: Callable[[int, int], None] = lambda done, of: None,
    halves_apart: bool = False,
    around: Callable[[Evaluation], Callable[[Tensor, int], Tensor]] = lambda evaluation: evaluation,
    engine: Engine = EAGER,
) -> Tensor:
    """Latents (B, C, h, w), in the type of the start.

    `prompt` has B rows, `negative` B or one. `on_step` is called with the number of evaluations done and of all.
    `around` is given the evaluation and returns what is called in its place (see tiles.py). For the other arguments see
    `Evaluation`."""
    scheduler.set_timesteps(steps, device=unet.device)
    times = start.times(scheduler)
    options = {"generator": start.generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    evaluate = around(
        Evaluation(unet, times.to(unet.device), prompt, negative, controls, guidance, halves_apart, engine)
    )
    z = start.first(scheduler, unet.device)  # (B, C, h, w)
    for i, t in enumerate(times):
        z_t = start.model_input(scheduler.scale_model_input(z, t))  # (B, C', h, w)
        prediction = evaluate(z_t, i).to(z.dtype)  # (B, C, h, w): eps, v or z_0
        z = scheduler.step(prediction, t, z, **options, return_dict=False)[0]
        z = start.after(z, i + 1)
        on_step(i + 1, len(times))
    return z


class Evaluation:
    """The base's prediction for z_t in evaluation i, under guidance and control. What is the same for every step of a
    schedule is computed once, when it is made.

    With guidance 1, or without a negative prompt, the unconditional half is not computed. `halves_apart` computes one
    half after the other: less memory, but what they share is computed twice.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        times: Tensor,
        prompt: Prompt,
        negative: Prompt | None,
        controls: Sequence[ActiveNet],
        guidance: float,
        halves_apart: bool = False,
        engine: Engine = EAGER,
    ):
        self.unet, self.guidance, self.halves_apart, self.engine = unet, guidance, halves_apart, engine
        self.passes = passes_of(controls)
        self.count = len(times)
        self.prompt = prompt  # B rows
        self.guided = negative is not None and guidance != 1
        self.negative = negative.rows(len(prompt)) if negative is not None and self.guided else prompt
        together = self.guided and not halves_apart
        self.rows = Prompt.cat([self.negative, prompt]) if together else prompt  # 2B, or B
        self.times = embed_times(unet, times, unet.dtype)  # (n, 4C)
        self.begun = {one.net: one.net.begin(times, unet.dtype) for one in controls}
        self._joined: dict[Any, Any] = {}

    def under(self, controls: Sequence[ActiveNet]) -> Evaluation:
        """The same evaluation with other conditions for the same networks."""
        other = copy.copy(self)
        other.passes, other._joined = passes_of(controls), {}
        return other

    def __call__(self, z_t: Tensor, i: int) -> Tensor:
        """The prediction (B, C, h, w) for z_t (B, C', h, w) in evaluation i."""
        z = z_t.to(self.unet.dtype).contiguous(memory_format=torch.channels_last)
        out = self._predict(z, i, self.rows, self.passes).to(z_t.dtype)
        if not self.guided:
            return out
        if self.halves_apart:
            in_both = [together for together in self.passes if together[0].strength.control_on != "cond"]
            out = torch.cat([self._predict(z, i, self.negative, in_both).to(z_t.dtype), out])
        without, with_prompt = out.chunk(2)
        return without + self.guidance * (with_prompt - without)

    def _predict(self, z: Tensor, i: int, prompt: Prompt, passes: list[list[ActiveNet]]) -> Tensor:
        return self.engine.predict(self.unet, z, self.times[i : i + 1], prompt, self._control(z, i, prompt, passes))

    def _control(self, z: Tensor, i: int, prompt: Prompt, passes: list[list[ActiveNet]]) -> Control | None:
        """The sum of the controls that act in evaluation i, for the rows of a prompt; None if none acts. A ControlNet
        whose scale is 0 is not run. One that acts on the conditional half alone reads only that half, and its control
        is zero in the other."""
        total: Control | None = None
        z = z[:, : self.unet.config.out_channels]  # without what an inpainting base reads beside the latents
        for together in passes:
            acting = [(one, scale) for one in together if (scale := one.strength.at(i, self.count)) != 0]
            if not acting:
                continue
            net, strength = together[0].net, together[0].strength
            alone = strength.control_on == "cond" and len(prompt) > len(self.prompt)
            time = self.begun[net][i : i + 1]
            control = self.engine.control(net, z, time, self.prompt if alone else prompt, self._join(net, acting))
            control = strength.apply(control, acting[0][1] if len(acting) == 1 else 1.0)  # several: scaled by `_join`
            if alone:
                control = control.zero_in_unconditional_half()
            total = control if total is None else total + control
        return total

    def _join(self, net: Net, acting: list[tuple[ActiveNet, float]]) -> Any:
        """What the network reads of the conditions that act, computed once as long as they and their scales stay."""
        key = tuple((id(one), scale) for one, scale in acting)
        if key not in self._joined:
            rows = [(one.feature, one.type, scale) for one, scale in acting]
            self._joined[key] = net.join(*zip(*rows, strict=True))
        return self._joined[key]
