"""What sampling and training need from a network that controls: controlnet.py, union.py, lite.py and t2i.py have one
each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from controlnet.model.control.control import Control
from controlnet.model.control.prompt import Prompt
from torch import Tensor

Feature = Tensor | list[Tensor]


def cat_features(features: Sequence[Feature]) -> Feature:
    """The features of several conditions as one, a row each."""
    if isinstance(features[0], Tensor):
        return torch.cat(features)  # type: ignore[arg-type]
    return [torch.cat(column) for column in zip(*features, strict=True)]


class Net(Protocol):
    """Letters: B batch, C channels, H W pixels, h w latent."""

    types: int | None
    """How many types of condition it tells apart, and takes in one pass; None for a network of one type."""

    @property
    def averages(self) -> bool:
        """Whether its control is averaged over the picture, and acts on the half with the prompt alone."""

    @property
    def connections(self) -> int:
        """How many residuals its Control has."""

    def prepare(self, condition: Tensor) -> Feature:
        """The feature (B, C, h, w), or several, of a condition (B, 3, H, W) in [0, 1], or (B, 4, H, W) whose last
        channel is 1 where the condition is seen. Once per image: it depends on neither z_t nor t."""

    def join(self, features: Sequence[Any], types: Sequence[int], scales: Sequence[float]) -> Any:
        """What `control` reads of the conditions of one pass, each with its type and its scale. The scale of a
        condition alone is not applied here, but to the Control that comes of it."""

    def begin(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network computes from timesteps (n,) alone, (n, ...). Once per schedule."""

    def control(self, z: Tensor, time: Tensor, prompt: Prompt, feature: Any) -> Control:
        """Control for z_t (B, 4, h, w). `time` has one row of `begin`'s result, (1, ...), or one per image, (B, ...).
        The prompt has B rows, or 2B for both halves of the guidance."""
