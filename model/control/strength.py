"""How strongly a control acts, where and when: scale, window, weighting, region (paper section 3.4).

Order of the connections everywhere: the down residuals, conv_in's first, then the middle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.control.control import Control
from controlnet.model.control.weighting import weights_of
from torch import Tensor


@dataclass(frozen=True)
class Strength:
    """How one ControlNet acts in the sampling of an image."""

    scale: float | tuple[tuple[float, float], ...] = 1.0
    """One number, or a schedule of (value, from): `value` from that part of the sampling on, 0 before the first. A
    negative scale drives the image away from the condition."""
    start: float = 0.0
    end: float = 1.0
    """The window: evaluation i of n is in it iff i/n >= start and (i+1)/n <= end, which is diffusers' rule."""
    weighting: str | tuple[float, ...] = "uniform"
    """A name (modes.WEIGHTINGS), or a weight for each connection."""
    control_on: str | None = None
    """`both` halves of the guidance, or `cond`: only the half that reads the prompt (paper section 3.4). None means the
    base's default in `sampling/generate.py`, and both in the sampling loop."""
    region: np.ndarray | None = None
    """Where control acts: (H, W) float in [0, 1] on the canvas, or everywhere."""

    def at(self, i: int, evaluations: int) -> float:
        """The scale in evaluation i. If it is 0, the ControlNet need not run."""
        if not self._inside(i, evaluations) or (self.region is not None and not self.region.any()):
            return 0.0
        if not isinstance(self.scale, tuple):
            return self.scale
        return next((value for value, begin in reversed(self.scale) if i / evaluations >= begin), 0.0)

    def acts_in(self, evaluations: int) -> bool:
        """False if it should act (its scale is not 0) but none of so many evaluations falls into its window or
        schedule."""
        wanted = any(value for value, _ in self.scale) if isinstance(self.scale, tuple) else self.scale
        everywhere = replace(self, region=None)
        return not wanted or any(everywhere.at(i, evaluations) for i in range(evaluations))

    def _inside(self, i: int, evaluations: int) -> bool:
        return i / evaluations >= self.start and (i + 1) / evaluations <= self.end

    def apply(self, control: Control, scale: float) -> Control:
        """Each residual times scale, its connection's weight, and the region at its size."""
        residuals = control.residuals
        weights: list[float | Tensor] = [scale * w for w in weights_of(self.weighting, residuals)]
        if self.region is not None:
            region = torch.from_numpy(self.region).to(residuals[0])[None, None]
            sizes = [(r.shape[-2], r.shape[-1]) for r in residuals]
            weights = [w * F.adaptive_avg_pool2d(region, size) for w, size in zip(weights, sizes, strict=True)]
        elif all(w == 1 for w in weights):
            return control
        return control.scaled(weights)
