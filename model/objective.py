"""What training minimises (paper Eq. 5): the mean square of target minus prediction at a random timestep.

The target is eps, or v or z_0 for a base whose scheduler says so.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Diffusion:
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
        """One loss a sample, (B,). With min_snr, weighted as in Hang et al. 2023 (arXiv 2303.09556)."""
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
