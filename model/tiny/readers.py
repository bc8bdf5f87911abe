"""How well an image keeps to its condition, on scenes whose truth is known; one row per kind.

The condition is what a user would make from the scene's picture: detected at 512 pixels, then brought to the model's
size. The score compares it with what is detected on an image. BlazePose, trained on photos, finds 0.96 of the joints of
drawn scenes but half of those of images of `tiny`, whose figures are smoother (benchmarks/LOG.md), so a network trained
on the world reads the joints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.sampling.canvas import to_canvas
from controlnet.model.tiny.stages import end_if_stopped, randomness
from controlnet.model.tiny.world.render import POSTER
from controlnet.model.tiny.world.shards import World
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.loop import LoopConfig, fit
from controlnet.model.training.precision import autocast
from controlnet.preprocessors.agreement import edge_f1, pck, rank_correlation
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.detectors.depth import DepthOptions, tiny_depth
from controlnet.preprocessors.detectors.tiny_depth import Dense
from controlnet.preprocessors.geometry import fit as fit_size
from controlnet.preprocessors.skeleton import draw
from controlnet.preprocessors.weights import find
from torch import Tensor

DETECTED_AT = (512, 512)


def user_canny(image: np.ndarray) -> np.ndarray:
    """The condition (H, W, 3) uint8 a user would make of a picture (H, W, 3): `detect canny` at 512 pixels, then
    brought back to the picture's size as `generate` does."""
    edges = canny(fit_size(image, DETECTED_AT))
    return to_canvas(np.repeat(edges[..., None], 3, 2), "canny", (image.shape[1], image.shape[0]))


def user_depth(image: np.ndarray) -> np.ndarray:
    """The same by `detect depth`, with the embedded network."""
    map_, _ = tiny_depth(fit_size(image, DETECTED_AT), DepthOptions(), find("tiny-depth"))
    return to_canvas(np.repeat(map_[..., None], 3, 2), "depth", (image.shape[1], image.shape[0]))


def pose_of(joints: np.ndarray, size: int) -> np.ndarray:
    """The pose map (size, size, 3) uint8 of joints (18, 3) in pixels and visibility."""
    return draw([joints / (size, size, 1)], (size, size))


class Reader:
    """A network, trained on the world, that reads what stands where in a picture of it, drawn or generated."""

    name: str
    channels: int

    def __init__(self, network: Dense | None = None):
        self.network = network or Dense(self.channels)

    def scenes(self, world: World) -> np.ndarray:
        """Rows of the scenes it learns from."""
        return np.arange(len(world.images))

    def loss(self, read: Tensor, world: World, rows: np.ndarray) -> Tensor:
        """Scalar: how far what was read, (B, channels, H/2, W/2), is from the truth of the scenes `rows` (B,)."""
        raise NotImplementedError

    def train(
        self, world: World, blurred: Callable[[], np.ndarray], folder: Path, minutes: float, device: torch.device
    ) -> None:
        """Train the network. 60 % of the pictures are the VAE's reconstructions of the scenes: `blurred()`, (N, H, W,
        3) uint8."""
        torch.manual_seed(0)
        self.network.to(device).to(memory_format=torch.channels_last)

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng([10, step])
            chosen = rng.integers(len(world.images), size=32)
            pictures = [(blurred() if rng.random() < 0.6 else world.images)[row] for row in chosen]
            pictures = [cv2.GaussianBlur(p, (0, 0), rng.uniform(0.3, 1.2)) for p in pictures]
            x = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
            noise = torch.randn(x.shape, generator=randomness(device, 10, step), device=device)
            x = (x + 0.03 * noise).clamp(0, 1)
            with autocast(device):
                read = self.network(x).float()
            return self.loss(read, world, chosen)

        state = Checkpoints(folder / "checkpoints").load()
        if state is None or state["progress"]["seconds"] < 60 * minutes:
            blurred()  # before the clock of the training starts
        fit(self.network, loss_of, LoopConfig(minutes=minutes, learning_rate=1e-3), folder, print)
        end_if_stopped(folder)
        self.network.eval()

    def batches(self, images: np.ndarray, batch: int) -> Iterator[Tensor]:
        """The network's output for images (N, H, W, 3) uint8, `batch` at a time."""
        device = next(self.network.parameters()).device
        for i in range(0, len(images), batch):
            x = torch.from_numpy(images[i : i + batch]).to(device).permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode():
                yield self.network(x)


class JointReader(Reader):
    """Reads the 18 joints off a picture of one of the world's people: one heat map per joint."""

    name = "reader"
    channels = 18

    def scenes(self, world: World) -> np.ndarray:
        return np.flatnonzero(world.joints[..., 2].any(1))

    def loss(self, read: Tensor, world: World, rows: np.ndarray) -> Tensor:
        side = read.shape[-1]
        joints = torch.from_numpy(world.joints[rows]).to(read.device)
        column, line = (joints[..., :2] / 2).long().clamp(0, side - 1).unbind(-1)
        places = (line * side + column).flatten()
        losses = F.cross_entropy(read.flatten(2).flatten(0, 1), places, reduction="none")
        return (losses * joints[..., 2].flatten()).sum() / joints[..., 2].sum()

    def read(self, images: np.ndarray, batch: int = 50) -> np.ndarray:
        """(N, H, W, 3) uint8 -> joints (N, 18, 2), x and y in pixels: the centre of a heat map's mass near its peak."""
        found = []
        for heat in self.batches(images, batch):
            n, _, rows, columns = heat.shape
            at = heat.flatten(2).argmax(2)
            peak = torch.stack([at % columns, at // columns], -1)  # (N, 18, 2)
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            grid = torch.stack([x, y], -1).to(heat.device)  # (h, w, 2)
            near = ((grid - peak[:, :, None, None]).abs() <= 2).all(-1)
            mass = heat.masked_fill(~near, -torch.inf).flatten(2).softmax(2).reshape(n, 18, rows, columns)
            found.append((2 * ((mass[..., None] * grid).sum((2, 3)) + 0.5)).cpu().numpy())
        return np.concatenate(found)


class PartReader(Reader):
    """Tells floor, wall, main object, other objects and posters apart in a picture (the values of World.parts)."""

    name = "parts"
    channels = POSTER + 1

    def loss(self, read: Tensor, world: World, rows: np.ndarray) -> Tensor:
        return F.cross_entropy(read, torch.from_numpy(world.parts[rows, ::2, ::2]).to(read.device).long())

    def read(self, images: np.ndarray, batch: int = 50) -> np.ndarray:
        """(N, H, W, 3) uint8 -> parts (N, H, W) uint8."""
        found = [read.argmax(1).to(torch.uint8).cpu().numpy() for read in self.batches(images, batch)]
        return np.concatenate(found).repeat(2, 1).repeat(2, 2)


@dataclass(frozen=True)
class Measure:
    """How one kind of condition is made of a scene, and how an image is judged by it."""

    kind: str
    name: str
    told: str
    """What the number is, for the card."""
    rows: Callable[[World], np.ndarray]
    """Scenes that have such a condition."""
    condition: Callable[[World, int], np.ndarray]
    """(world, scene) -> (H, W, 3) uint8."""
    scores: Callable[[np.ndarray, World, np.ndarray, list[np.ndarray]], np.ndarray]
    """(images (N, H, W, 3), world, rows (N,), their conditions) -> N scores, 1 for perfect ones."""


def measures(reader: JointReader) -> list[Measure]:
    """The measures, one per kind; poses are judged by `reader`."""

    def everything(world: World) -> np.ndarray:
        return np.arange(len(world.images))

    def people(world: World) -> np.ndarray:
        return (world.joints[..., 2].sum(1) >= 10).nonzero()[0]

    def canny_scores(images, world, rows, conditions):
        tolerance = 2 if images.shape[1] >= 256 else 1
        return [edge_f1(user_canny(i)[..., 0], c[..., 0], tolerance) for i, c in zip(images, conditions, strict=True)]

    def pose_scores(images, world, rows, conditions):
        return [pck(found, true) for found, true in zip(reader.read(images), world.joints[rows], strict=True)]

    def depth_scores(images, world, rows, conditions):
        return [rank_correlation(user_depth(i)[..., 0], c[..., 0]) for i, c in zip(images, conditions, strict=True)]

    # Which scenes are judged, the condition of a scene, and the scores of images.
    return [
        Measure(
            "canny",
            "F1",
            "F1 between the condition and the edges detected again on the image, within 1 pixel (2 at 256)",
            everything,
            lambda world, row: user_canny(world.images[row]),
            canny_scores,
        ),
        Measure(
            "pose",
            "PCK@0.1",
            "the share of joints that a network trained on the world's people finds in the image"
            " within 0.1 of the figure's longer side of where the condition has them",
            people,
            lambda world, row: pose_of(world.joints[row], world.images.shape[1]),
            pose_scores,
        ),
        Measure(
            "depth",
            "rank correlation",
            "Spearman's rank correlation of the condition (`detect depth` on the scene's"
            " picture) with the depth detected on the image",
            everything,
            lambda world, row: user_depth(world.images[row]),
            depth_scores,
        ),
    ]
