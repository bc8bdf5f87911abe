"""The procedural world drawn once and kept on disk: shards of scenes that training and evaluation read.

Drawing 10,000 scenes at 256 pixels takes some ten minutes on two cores; a shard is written whole or not at all, so
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controlnet.model.tiny.world.render import render
from controlnet.model.tiny.world.scenes import WORLD_VERSION, make_scene
from controlnet.preprocessors.errors import OutputError
from controlnet.preprocessors.files import beside, write_file
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.workers import workers

SHARD = 250
DRAWERS = 8
"""Processes that draw on one GPU."""
HELD_OUT = 10_000_000
"""Seeds from here on are for evaluation; training seeds stay below."""


@dataclass
class World:
    """N drawn scenes. images (N, H, W, 3) uint8; depth (N, H, W) float16 metres; parts (N, H, W) uint8;
    joints (N, 18, 3) pixels and visibility; captions N strings. Pictures may be mapped from a file: read-only."""

    images: np.ndarray
    depth: np.ndarray
    parts: np.ndarray
    joints: np.ndarray
    captions: list[str]

    def only(self, rows: np.ndarray) -> World:
        """The world with only the scenes `rows`."""
        arrays = (self.images[rows], self.depth[rows], self.parts[rows], self.joints[rows])
        return World(*arrays, [self.captions[row] for row in rows])


def draw_shard(path: Path, first_seed: int, size: int, device: str = "cpu") -> Path:
    """Draw SHARD scenes from `first_seed` on into one compressed file, unless it is there."""
    if path.exists():
        return path
    scenes = [make_scene(first_seed + i) for i in range(SHARD)]
    batches = [render(scenes[i : i + 25], size, device) for i in range(0, SHARD, 25)]
    fields: dict[str, Any] = {
        "images": torch.cat([b.images for b in batches]).cpu().numpy(),
        "depth": torch.cat([b.depth for b in batches]).clamp(max=100).half().cpu().numpy(),
        "parts": torch.cat([b.parts for b in batches]).cpu().numpy(),
        "joints": torch.cat([b.joints for b in batches]).numpy(),
        "captions": np.array([scene.caption for scene in scenes]),
    }
    with beside(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **fields)
    return path


def world(folder: Path, scenes: int, size: int, first_seed: int = 0, device: str = "cpu", report=print) -> World:
    """`scenes` drawn scenes from `first_seed` on, from the shards in `folder` (drawn first where missing)."""
    folder = Path(folder) / f"v{WORLD_VERSION}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(first_seed, first_seed + scenes, SHARD)
    paths = [folder / f"{start:08d}.npz" for start in starts]
    missing = [(path, start) for path, start in zip(paths, starts, strict=True) if not path.exists()]
    if missing:
        # Several processes for one GPU as well: each launches many small programs, and packs what it drew.
        with workers(None if device == "cpu" else min(DRAWERS, os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(draw_shard, path, start, size, device) for path, start in missing]
            for i, job in enumerate(jobs):
                job.result()
                if i % 2 == 1 or i + 1 == len(jobs):
                    report(f"world: {(i + 1) * SHARD} of {len(missing) * SHARD} scenes drawn at {size} pixels")
    arrays = {key: _mapped(paths, key, scenes) for key in ("images", "depth", "parts")}
    joints = np.concatenate([_field(path, "joints") for path in paths])[:scenes]
    captions = np.concatenate([_field(path, "captions") for path in paths])[:scenes]
    return World(**arrays, joints=joints, captions=captions.tolist())


def _field(path: Path, key: str) -> np.ndarray:
    """One field of a shard."""
    with np.load(path) as shard:
        return shard[key]


def _mapped(paths: list[Path], key: str, scenes: int) -> np.ndarray:
    """A field of all shards as one array mapped from a file beside them, written first if it is not there: 30,000
    scenes at 256 pixels are 12 GB, more than the memory of many machines."""
    joined = paths[0].with_suffix(f".{scenes}-{key}.npy")
    if not joined.exists():
        first = _field(paths[0], key)
        with beside(joined) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", first.dtype, (scenes, *first.shape[1:]))

            def unpack(i: int) -> None:
                rows = array[i * SHARD : (i + 1) * SHARD]
                rows[:] = _field(paths[i], key)[: len(rows)]

            with ThreadPoolExecutor() as pool:  # unpacking is done outside of Python
                list(pool.map(unpack, range(len(paths))))
            array.flush()
    return np.load(joined, mmap_mode="r")


def world_photos(folder: Path, scenes: int = 3000, size: int = 256, report=print) -> Path:
    """The first `scenes` of the world as a folder of pictures with captions, one of those in `folder`, drawn where it
    is not there. Raises OutputError."""
    folder = Path(folder) / f"v{WORLD_VERSION}-{size}-{scenes}"
    if (folder / "metadata.jsonl").is_file():
        return folder
    try:
        data = world(folder.parent / "shards", scenes, size, report=report)
    except OSError as error:
        raise OutputError(
            f"{folder}: the scenes cannot be kept there ({error.strerror})", "CONTROLNET_CACHE=DIR for another place"
        ) from error
    lines = []
    for index, (image, caption) in enumerate(zip(data.images, data.captions, strict=True)):
        write_file(folder / f"{index:05d}.png", png_bytes(image))
        lines.append(json.dumps({"file_name": f"{index:05d}.png", "text": caption}) + "\n")
    write_file(folder / "metadata.jsonl", "".join(lines).encode())
    return folder
