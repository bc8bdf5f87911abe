"""The condition maps that the ControlNets of `tiny` learn from: drawn by all cores before the training, by the
functions that users call, and kept on disk.

Beside a GPU, maps that were made step by step would be what the training waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from controlnet.model.sampling.canvas import to_canvas
from controlnet.model.tiny.world.shards import World, world
from controlnet.preprocessors.detectors.canny import CannyOptions, canny
from controlnet.preprocessors.detectors.depth import DepthOptions, to_map
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.detectors.tiny_depth import load, nearness
from controlnet.preprocessors.files import beside
from controlnet.preprocessors.skeleton import draw
from controlnet.preprocessors.weights import find
from controlnet.preprocessors.workers import workers

CPU = On("cpu")
"""A GPU is left to the training beside which maps are drawn."""
ROUNDS = 2
"""How many maps are made of a scene; they differ as users' do."""
PIECE = 250
"""Scenes that a worker draws at a time."""


def training_canny(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A canny condition (H, W, 3) uint8 of a training picture, as varied as users' are: random thresholds; detected at
    the picture's own size or at 512 pixels and brought back; some of the lines missing."""
    size = image.shape[0]
    low = int(rng.integers(30, 160))
    options = CannyOptions(low, int(low * rng.uniform(1.5, 2.5)))
    large = cv2.resize(image, (512, 512), interpolation=cv2.INTER_LANCZOS4) if rng.random() < 0.7 else image
    edges = canny(large, options)
    if rng.random() < 0.3:
        _, lines = cv2.connectedComponents(edges)
        missing = rng.random(lines.max() + 1) < rng.uniform(0, 0.5)
        edges = np.where(missing[lines], 0, edges).astype(np.uint8)
    return to_canvas(np.repeat(edges[..., None], 3, 2), "canny", (size, size))


def training_pose(joints: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A pose condition (size, size, 3) uint8 of joints (18, 3) in pixels and visibility: as a detector finds them, a
    little off, and sometimes with some missing."""
    person = joints.astype(np.float64)
    person[:, :2] = person[:, :2] / size + rng.normal(0, 0.004, (18, 2))
    if rng.random() < 0.4:
        person[rng.random(18) < rng.uniform(0, 0.4), 2] = 0
    return draw([person], (size, size))


def training_depth(data: World, row: int, rng: np.random.Generator) -> np.ndarray:
    """A depth condition (H, W, 3) uint8: the scene's own depth, or what the embedded detector makes of its picture."""
    if rng.random() < 0.5:
        near = nearness(load(find("tiny-depth"), CPU), data.images[row])
    else:
        near = 1 / data.depth[row].astype(np.float32)
    return np.repeat(to_map(near, DepthOptions())[0][..., None], 3, 2)


CONDITIONS: dict[str, Callable[[World, int, np.random.Generator], np.ndarray]] = {
    "canny": lambda data, row, rng: training_canny(data.images[row], rng),
    "pose": lambda data, row, rng: training_pose(data.joints[row], data.images.shape[1], rng),
    "depth": training_depth,
}
"""What a ControlNet of each kind is trained on: (world, scene, generator) -> condition (H, W, 3) uint8."""


def scenes_of(kind: str, data: World) -> np.ndarray:
    """Rows of the scenes that a kind is learned from: poses from those with a person."""
    return np.flatnonzero(data.joints[..., 2].any(1)) if kind == "pose" else np.arange(len(data.images))


def drawn(kind: str, data: World, shards: Path, path: Path, report: Callable[[str], None] = print) -> np.ndarray:
    """The maps of all scenes of a kind, (ROUNDS, scenes, H, W, C) uint8 mapped from `path`, drawn first if they are not
    there. C is 1 for maps in grey. `shards` is the folder that the world was read from. Raises ValueError for maps of
    other scenes."""
    if not path.exists():
        count, size = len(data.images), data.images.shape[1]
        rows = scenes_of(kind, data)
        pieces = [(k, at) for k in range(ROUNDS) for at in range(0, len(rows), PIECE)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as temporary:
            shape = (ROUNDS, len(rows), size, size, 3 if kind == "pose" else 1)
            np.lib.format.open_memmap(temporary, "w+", np.uint8, shape).flush()
            with workers() as pool:
                jobs = [pool.submit(_draw_piece, kind, shards, count, size, temporary, *piece) for piece in pieces]
                for job in jobs:
                    job.result()
            report(f"{kind}: {ROUNDS * len(rows)} maps drawn")
    maps = np.load(path, mmap_mode="r")
    if maps.shape[1] != (count := len(scenes_of(kind, data))):
        raise ValueError(f"{path}: holds maps of {maps.shape[1]} scenes, expected {count}; delete it")
    return maps


@cache
def _world(shards: Path, scenes: int, size: int) -> World:
    return world(shards, scenes, size)


def _draw_piece(kind: str, shards: Path, scenes: int, size: int, path: Path, k: int, at: int) -> None:
    """Draw the maps of PIECE scenes into the array at `path`."""
    data, maps = _world(shards, scenes, size), np.lib.format.open_memmap(path, "r+")
    rows = scenes_of(kind, data)
    for place, row in enumerate(rows[at : at + PIECE], at):
        maps[k, place] = CONDITIONS[kind](data, row, np.random.default_rng([7, k, row]))[..., : maps.shape[-1]]
    maps.flush()
