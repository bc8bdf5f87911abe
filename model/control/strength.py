"""How strongly a control acts, where and when: scale, window, weighting, region (paper sections 3.4 and 3.5).

Order of the connections everywhere: the down residuals, conv_in's first, then the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.control.controlnet import Control, ControlNet
from controlnet.preprocessors.errors import UsageError
from torch import Tensor

SOFT = 0.825
"""Ratio of neighbouring connections under `soft` (the released code's guess mode)."""


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
    """`both` halves of the guidance, or `cond`: only the half that reads the prompt (paper section 3.4). None is the
    base's own way in `generate`, and both halves in `sample`."""
    region: np.ndarray | None = None
    """Where control acts: (H, W) float in [0, 1] on the canvas, or everywhere."""

    def at(self, i: int, evaluations: int) -> float:
        """The scale in evaluation i. Where it is 0 the ControlNet need not run."""
        if not self._inside(i, evaluations) or (self.region is not None and not self.region.any()):
            return 0.0
        if not isinstance(self.scale, tuple):
            return self.scale
        return next((value for value, begin in reversed(self.scale) if i / evaluations >= begin), 0.0)

    def check_window(self, evaluations: int, flag: str) -> None:
        """Raises UsageError when the window, or a schedule in it, leaves no evaluation to act in."""
        wanted = any(value for value, _ in self.scale) if isinstance(self.scale, tuple) else self.scale
        everywhere = replace(self, region=None)
        if not wanted or any(everywhere.at(i, evaluations) for i in range(evaluations)):
            return
        raise UsageError(
            f"{flag}: acts in none of the {evaluations} evaluations (start={self.start:g}, end={self.end:g})",
            f"a window of {1 / evaluations:.2g} or more, such as end={min(1.0, self.start + 1 / evaluations):.2g};"
            " scale=0 for no control",
        )

    def _inside(self, i: int, evaluations: int) -> bool:
        return i / evaluations >= self.start and (i + 1) / evaluations <= self.end

    def apply(self, control: Control, scale: float) -> Control:
        """Each residual times scale, its connection's weight, and the region at its size."""
        residuals = [*control.down, control.middle]
        weights: list[float | Tensor] = [scale * w for w in weights_of(self.weighting, residuals)]
        if self.region is not None:
            region = torch.from_numpy(self.region).to(residuals[0])[None, None]
            sizes = [(r.shape[-2], r.shape[-1]) for r in residuals]
            weights = [w * F.adaptive_avg_pool2d(region, size) for w, size in zip(weights, sizes, strict=True)]
        elif all(w == 1 for w in weights):
            return control
        return control.scaled(weights)

    def check(self, net: ControlNet, name: str) -> None:
        """Raises UsageError when a weighting by numbers does not fit the ControlNet."""
        connections = len(net.controlnet_down_blocks) + 1
        if not isinstance(self.weighting, str) and len(self.weighting) != connections:
            raise UsageError(
                f"{name}: weighting has {len(self.weighting)} weights, expected {connections}: one for each of the "
                f"{connections - 1} skip connections, then the middle's",
                "weighting=" + "/".join(["1"] * connections),
            )


def weights_of(weighting: str | Sequence[float], residuals: Sequence[Tensor]) -> list[float]:
    """A weight for each connection, from the residuals' real sizes (B, C, h_i, w_i).

    `resolution`: proportional to 64 / h_i (paper section 3.4), the largest being 1. `soft`: 0.825 ** (n - 1 - i).
    """
    if not isinstance(weighting, str):
        return list(weighting)
    n = len(residuals)
    if weighting == "resolution":
        sides = [(r.shape[-2] * r.shape[-1]) ** 0.5 for r in residuals]
        return [min(sides) / side for side in sides]
    return [SOFT ** (n - 1 - i) if weighting == "soft" else 1.0 for i in range(n)]
