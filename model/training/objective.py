"""What training minimises (paper Eq. 5): the mean square of target minus prediction at a random timestep.

The target is eps, or v or z_0 for a base whose scheduler says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from controlnet.model.control.net import Net
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import denoise
from diffusers import UNet2DConditionModel
from scipy.stats import t
from torch import Tensor


class NoiseSchedule:
    """The forward process of a base's scheduler: z_t = alpha_t z_0 + sigma_t eps, and the training target.

    Raises ValueError for a prediction type other than epsilon, v_prediction, sample.
    """

    def __init__(self, scheduler, device: torch.device | str = "cpu"):
        alphas_cumprod = scheduler.alphas_cumprod.to(device, torch.float32)
        self.alpha, self.sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.prediction = scheduler.config.prediction_type
        self.timesteps = len(alphas_cumprod)
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction type {self.prediction!r}")

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t (B, C, h, w) at timesteps t (B,)."""
        alpha, sigma = self._at(t)
        return alpha * z0 + sigma * eps

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._at(t)
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * z0, "sample": z0}[self.prediction]

    def loss(self, prediction: Tensor, z0: Tensor, eps: Tensor, t: Tensor, min_snr: float | None = None) -> Tensor:
        """One loss per sample, (B,). With min_snr, weighted as in Hang et al. 2023 (arXiv 2303.09556)."""
        losses = (prediction.float() - self.target(z0, eps, t)).square().mean((1, 2, 3))
        if min_snr is None:
            return losses
        snr = (self.alpha[t] / self.sigma[t]) ** 2
        clipped = snr.clamp(max=min_snr)
        return (
            losses * {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[self.prediction]
        )

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)


@dataclass
class Batch:
    """What a step sees: z_0 and eps (B, C, h, w), t (B,), a prompt of B rows, condition (B, 3, H, W) in [0, 1]."""

    z0: Tensor
    eps: Tensor
    t: Tensor
    prompt: Prompt
    condition: Tensor

    def map(self, function) -> Batch:
        """The same batch with a function applied to each tensor."""
        prompt = self.prompt.map(function)
        return Batch(function(self.z0), function(self.eps), function(self.t), prompt, function(self.condition))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that is in it; `Batch.of(*tensors)` is the same batch."""
        return self.z0, self.eps, self.t, self.prompt.c_t, self.prompt.pooled, self.prompt.ids, self.condition

    @staticmethod
    def of(z0: Tensor, eps: Tensor, t: Tensor, c_t: Tensor, pooled: Any, ids: Any, condition: Tensor) -> Batch:
        return Batch(z0, eps, t, Prompt(c_t, pooled, ids), condition)


def control_losses(
    unet: UNet2DConditionModel,
    net: Net,
    schedule: NoiseSchedule,
    batch: Batch,
    min_snr: float | None = None,
) -> Tensor:
    """Eq. 5 for the locked base under a ControlNet's control: one loss per sample, (B,)."""
    z = schedule.add_noise(batch.z0, batch.eps, batch.t).contiguous(memory_format=torch.channels_last)
    control = net.control(z, net.begin(batch.t, z.dtype), batch.prompt, net.prepare(batch.condition))
    prediction = denoise(unet, z, batch.t, batch.prompt, control)
    return schedule.loss(prediction, batch.z0, batch.eps, batch.t, min_snr)


@torch.no_grad()
def control_gap(
    losses_of: Callable[[Batch], Tensor], batches: Iterable[tuple[Batch, Tensor]], looks: int = 1
) -> dict[str, float]:
    """How much higher the loss is with another pair's condition than with the true one.

    losses_of gives one loss per sample. Each batch has fixed noise and timesteps, and comes with the conditions of
    other pairs (B, 3, H, W). The samples are all pairs at a first timestep, then all at a second, and so on, `looks`
    times. A fresh ControlNet has a gap of exactly 0. `band` is the half-width of the gap's 95 % confidence interval
    (Student's t); each pair counts once, with the mean of its gaps, because its gaps at several timesteps are not
    independent. `validation_loss` is the loss with the true conditions.
    """
    true, other = [], []
    for batch, others in batches:
        true.append(losses_of(batch).double())
        other.append(losses_of(replace(batch, condition=others)).double())
    gaps = (torch.cat(other) - torch.cat(true)).view(looks, -1).mean(0)
    return {
        "validation_loss": float(torch.cat(true).mean()),
        "control_gap": float(gaps.mean()),
        "band": float(t.ppf(0.975, len(gaps) - 1) * gaps.std() / len(gaps) ** 0.5),
    }
