"""Large pictures in tiles: seams, memory and time, on the embedded model.

make bench-tiles        (minutes; `python benchmarks/tiles.py --megapixels 1` for less)
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import cv2
import numpy as np
import torch
from controlnet.model.load import load_base
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.sampling.tiles import tiles_of

STEPS, STRENGTH = 8, 0.6
PROMPT = "a red cube, blue wall"


def start(side: int, seed: int) -> np.ndarray:
    """A smooth picture of random colours."""
    small = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def make(base, side: int, seed: int, tile: int | None) -> np.ndarray:
    request = Request(PROMPT, seed, init=start(side, seed))
    return next(generate(base, [request], size=(side, side), steps=STEPS, strength=STRENGTH, tile=tile))


def borders(base, side: int) -> list[int]:
    """Columns at which a tile begins or ends, in pixels."""
    tiles = tiles_of((side // base.factor,) * 2, base.native_size // base.factor)
    ends = {t.left for t in tiles} | {t.left + t.width for t in tiles}
    return [end * base.factor for end in sorted(ends) if 0 < end < side // base.factor]


def seams(base, side: int, images: int = 16) -> dict[str, tuple[float, float]]:
    """How much larger the step between neighbouring columns is at the borders of tiles than at other borders of cells:
    mean over images and its standard error; in tiles that overlap, in tiles made one by one and put together, without
    tiles, and the difference that overlapping tiles make to an image."""
    cells, at = range(base.factor, side, base.factor), borders(base, side)
    count = side // base.native_size
    apart_at = [k * base.native_size for k in range(1, count)]

    def ratio(image: np.ndarray, at: list[int]) -> float:
        step = np.abs(np.diff(image.astype(np.float32), axis=1)).mean((0, 2))  # from column x to x + 1
        others = [x for x in cells if x not in at]
        return float(step[[x - 1 for x in at]].mean() / step[[x - 1 for x in others]].mean())

    def apart(seed: int) -> np.ndarray:
        whole, tile = start(side, seed), base.native_size
        parts = [
            [np.ascontiguousarray(whole[y : y + tile, x : x + tile]) for x in range(0, side, tile)]
            for y in range(0, side, tile)
        ]
        requests = [Request(PROMPT, seed, init=part) for row in parts for part in row]
        made = list(generate(base, requests, size=(tile, tile), steps=STEPS, strength=STRENGTH))
        return np.concatenate([np.concatenate(made[r * count : (r + 1) * count], 1) for r in range(count)], 0)

    found = {
        "overlapping": [ratio(make(base, side, seed, base.native_size), at) for seed in range(images)],
        "put together": [ratio(apart(seed), apart_at) for seed in range(images)],
        "no tiles": [ratio(make(base, side, seed, None), at) for seed in range(images)],
    }
    found["overlapping, less no tiles"] = list(np.subtract(found["overlapping"], found["no tiles"]))
    return {name: (float(np.mean(r)), float(np.std(r) / len(r) ** 0.5)) for name, r in found.items()}


def measured(side: int, tile: int | None) -> None:
    """One picture, its time and the memory it took, in a process of its own."""
    base = load_base("tiny", dtype=torch.bfloat16)
    make(base, 2 * base.native_size, 0, base.native_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    make(base, side, 1, tile)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"| {side}x{side} | {'yes' if tile else 'no'} | {time.perf_counter() - began:.1f} | {more:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megapixels", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--no-memory", action="store_true", help="seams only")
    parser.add_argument("--one", type=int, nargs=2, metavar=("SIDE", "TILE"))
    args = parser.parse_args()
    if args.one:
        measured(args.one[0], args.one[1] or None)
        return
    base = load_base("tiny", dtype=torch.bfloat16)
    print("| | step at the borders of tiles / at other borders of cells |\n|---|---|")
    for name, (mean, error) in seams(base, 4 * base.native_size).items():
        print(f"| {name} | {mean:.3f} +- {error:.3f} |", flush=True)
    if args.no_memory:
        return
    print(f"\n{os.cpu_count()} cores, torch {torch.__version__}, {STEPS} steps of which {STRENGTH:g} are made")
    print("| canvas | tiles | s | MB more than the model |\n|---|---|---|---|", flush=True)
    for megapixels in args.megapixels:
        for tile in (base.native_size, 0) if megapixels == 1 else (base.native_size,):
            side = round(megapixels**0.5 * 1024)
            subprocess.run([sys.executable, __file__, "--one", str(side), str(tile)], check=True)


if __name__ == "__main__":
    main()
