"""Weights of the connections (paper section 3.4, resolution weighting; the released code's guess mode)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

SOFT = 0.825
"""Ratio of neighbouring connections under `soft`."""


def weights_of(weighting: str | Sequence[float], residuals: Sequence[Tensor]) -> list[float]:
    """One weight per connection, from the sizes of the residuals (B, C, h_i, w_i).

    `resolution`: proportional to 64 / h_i, the largest weight being 1. `soft`: 0.825 ** (n - 1 - i). `uniform`: 1.
    Numbers are used as given. Raises ValueError for an unknown name.
    """
    if not isinstance(weighting, str):
        return list(weighting)
    n = len(residuals)
    if weighting == "resolution":
        # Proportional to 64 / h_i, so the smallest residual counts most.
        sides = [(r.shape[-2] * r.shape[-1]) ** 0.5 for r in residuals]
        return [min(sides) / side for side in sides]
    if weighting == "soft":
        return [SOFT ** (n - 1 - i) for i in range(n)]
    if weighting != "uniform":
        raise ValueError(f"unknown weighting {weighting!r}")
    return [1.0] * n
