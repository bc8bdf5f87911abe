"""The embedded depth network: small enough to ship, trained on this project's drawn rooms and scenes alone
(`model/tiny/depth.py`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.detectors.networks import Network
from controlnet.preprocessors.errors import ModelError, reason
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128, 192)
"""Channels at 1/2, 1/4, ... 1/32 of the picture's side."""
STRIDE = 2 ** len(WIDTHS)
SIDE = 160
"""The shorter side, in pixels, that photos are brought to; in training it was 128."""


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, width)


class Residual(nn.Module):
    """x + two normalised convolutions of it."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            _norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            _norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """A number for every second pixel: (B, 3, H, W) RGB in [0, 1], H and W multiples of STRIDE -> (B, C, H/2, W/2).

    An encoder-decoder of residual blocks with attention at its coarsest level.
    """

    def __init__(self, channels: int = 1):
        super().__init__()
        self.enter = nn.ModuleList(
            nn.Conv2d(before, width, 3, stride=2, padding=1)
            for before, width in zip((5, *WIDTHS), WIDTHS, strict=False)
        )
        self.down = nn.ModuleList(nn.Sequential(Residual(w), Residual(w)) if w > 16 else Residual(w) for w in WIDTHS)
        layer = nn.TransformerEncoderLayer(WIDTHS[-1], 4, 2 * WIDTHS[-1], 0.0, batch_first=True, norm_first=True)
        self.middle = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.narrow = nn.ModuleList(nn.Conv2d(w, v, 1) for v, w in zip(WIDTHS, WIDTHS[1:], strict=False))
        self.up = nn.ModuleList(Residual(w) for w in WIDTHS[:-1])
        self.out = nn.Conv2d(WIDTHS[0], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # A pixel's position says much about its distance, so it is added as two channels.
        rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[2:])
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        x = torch.cat([2 * x - 1, place.expand(len(x), -1, -1, -1)], 1)
        skips = []
        for enter, block in zip(self.enter, self.down, strict=True):
            x = block(enter(x))
            skips.append(x)
        x = self.middle(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        for k in reversed(range(len(self.up))):
            x = F.interpolate(self.narrow[k](x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = self.up[k](x + skips[k])
        return self.out(x)


@torch.inference_mode()
def nearness(network: Callable[[Tensor], Tensor], image: np.ndarray) -> np.ndarray:
    """The inverse distance up to a factor, (H, W) float, in a picture (H, W, 3) uint8. The network gives its
    logarithm."""
    height, width = image.shape[:2]
    times = SIDE / min(height, width)
    sides = [max(STRIDE, min(8 * SIDE, round(side * times / STRIDE) * STRIDE)) for side in (width, height)]
    small = cv2.resize(image, sides, interpolation=cv2.INTER_AREA if times < 1 else cv2.INTER_CUBIC)
    x = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255
    logarithm = network(x)[0, 0]
    found = (logarithm - logarithm.max()).exp().numpy()
    return cv2.resize(found, (width, height), interpolation=cv2.INTER_CUBIC).clip(found.min(), found.max())


@cache
def load(weights: Path, on: On = On()) -> Callable[[Tensor], Tensor]:
    """The network from `model.safetensors` in a folder, in float32."""
    from safetensors.torch import load_file

    network = Dense()
    try:
        network.load_state_dict(load_file(weights / "model.safetensors"))
    except Exception as error:  # safetensors' own errors, missing keys, shapes
        raise ModelError(
            f"{weights}: does not hold tiny-depth ({reason(error)})",
            "leave --weights out, or install the package again",
        ) from error
    shared = Network(network, on)
    return lambda x: shared(x=x)[0]
