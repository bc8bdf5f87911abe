"""Does M-LSD find straight lines where they are? Drawn quadrilaterals, whose edges are known.

    python benchmarks/lines.py WEIGHTS [--count 100]

Each picture has three quadrilaterals of random colours before a shaded ground, some noise, and round things between
them, which have no straight lines. Found lines are counted where they lie within 4 pixels of a true edge, true edges
where a found line lies within 4 pixels; beside it OpenCV's line segment detector (of 20 pixels or more) and Canny.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.detectors.mlsd import MlsdOptions, mlsd

SIDE, NEAR = 512, 4


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture (512, 512, 3) uint8 and its true edges (512, 512), 0 or 255."""
    across = np.linspace(0, 1, SIDE)[:, None, None]
    ground = rng.integers(60, 200, 3) * (1 - across) + rng.integers(60, 200, 3) * across
    image = np.broadcast_to(ground, (SIDE, SIDE, 3)).astype(np.uint8).copy()
    edges = np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(3):
        cv2.circle(
            image, rng.integers(0, SIDE, 2).tolist(), int(rng.integers(15, 50)), rng.integers(0, 255, 3).tolist(), -1
        )
        middle, size = rng.integers(110, SIDE - 110, 2), rng.integers(50, 100)
        turned = rng.uniform(0, np.pi / 2) + np.arange(4) * np.pi / 2 + rng.uniform(-0.3, 0.3, 4)
        corners = (middle + size * np.column_stack([np.cos(turned), np.sin(turned)])).astype(np.int32)
        cv2.fillPoly(image, [corners], rng.integers(0, 255, 3).tolist(), cv2.LINE_AA)
        cv2.fillPoly(edges, [corners], 0)  # it hides what is behind it
        cv2.polylines(edges, [corners], True, 255, 1)
    noisy = image + rng.normal(0, 4, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), edges


def segments(image: np.ndarray) -> np.ndarray:
    """OpenCV's line segment detector (Grompone von Gioi et al. 2010)."""
    map_ = np.zeros(image.shape[:2], np.uint8)
    found = cv2.createLineSegmentDetector().detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    for x0, y0, x1, y1 in (found if found is not None else np.empty((0, 1, 4))).reshape(-1, 4):
        if np.hypot(x1 - x0, y1 - y0) >= 20:
            cv2.line(map_, (int(x0), int(y0)), (int(x1), int(y1)), 255, 1)
    return map_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    ways = {
        "M-LSD": lambda image: mlsd(image, MlsdOptions(), args.weights), "OpenCV's segments": segments, "Canny": canny,
    }  # fmt: skip
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * NEAR + 1,) * 2)
    right: dict[str, list[float]] = {name: [] for name in ways}
    reached: dict[str, list[float]] = {name: [] for name in ways}
    rng = np.random.default_rng(0)
    for _ in range(args.count):
        image, edges = drawn(rng)
        for name, way in ways.items():
            found = way(image)
            right[name].append(float((cv2.dilate(edges, disc)[found > 0] > 0).mean()) if found.any() else 0.0)
            reached[name].append(float((cv2.dilate(found, disc)[edges > 0] > 0).mean()))
    print("| lines by | of what it draws, on an edge | of the edges, drawn | F1 |\n|---|---|---|---|")
    for name in ways:
        p, r = np.mean(right[name]), np.mean(reached[name])
        print(f"| {name} | {p:.2f} | {r:.2f} | {2 * p * r / (p + r):.2f} |")


if __name__ == "__main__":
    main()
