"""Spearman's rank correlation of depth maps with what a sensor measured.

    python benchmarks/depths.py RGBD [--detector tiny-depth]

RGBD: a folder as Open3D's sample data has it, `color/` and `depth/` (Redwood, mm) and `other_formats/` (SUN, TUM, NYU).
scikit-image's stereo_motorcycle is measured besides. Beside the detector: "ramp", which calls every point farther the
higher it is in the picture. Only pixels with a measured distance count.
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.images import read_image


def nearness_of(name: str, folder: Path) -> np.ndarray:
    """The sensor's picture of a scene as numbers that grow towards the camera, 0 where it saw nothing."""
    if name == "NYU":  # big-endian on paper, little-endian in fact
        raw = np.frombuffer((folder / "NYU_depth.pgm").read_bytes()[-2 * 480 * 640 :], "<u2").reshape(480, 640)
        metres = 351.3 / (1092.5 - raw.astype(float))
        return np.where((raw > 0) & (metres > 0.4) & (metres < 10), 1 / metres, 0)
    raw = cv2.imread(str(folder / f"{name}_depth.png"), cv2.IMREAD_UNCHANGED)
    if name == "SUN":
        raw = (raw >> 3) | (raw << 13)
    return np.where(raw > 0, 1 / np.maximum(raw.astype(float), 1e-9), 0)


def scenes(folder: Path):
    """(name, picture (H, W, 3), nearness (H, W))."""
    import skimage.data

    def picture(path: Path) -> np.ndarray:
        return read_image(path.read_bytes(), path.name)[0]

    other = folder / "other_formats"
    for name, file in (("SUN", "SUN_color.jpg"), ("TUM", "TUM_color.png"), ("NYU", "NYU_color.ppm")):
        yield name, picture(other / file), nearness_of(name, other)
    for color in sorted((folder / "color").iterdir()):
        raw = cv2.imread(str(folder / "depth" / f"{color.stem}.png"), cv2.IMREAD_UNCHANGED).astype(float)
        yield f"Redwood {color.stem}", picture(color), np.where(raw > 0, 1 / np.maximum(raw, 1), 0)
    left, _, disparity = skimage.data.stereo_motorcycle()
    yield "motorcycle", left, np.where(np.isfinite(disparity), disparity, 0)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Equal numbers share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--detector")
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    row = find_detector("depth", args.detector)
    make = row.ready(row.load_options()(raw=True), args.weights)
    print(f"| scene | {row.name} | ramp | s |\n|---|---|---|---|")
    found: dict[str, list[tuple[float, float]]] = {}
    for name, image, true in scenes(args.folder):
        start = time.perf_counter()
        map_, _ = make(image)
        seconds = time.perf_counter() - start
        map_ = cv2.resize(map_, true.shape[::-1], interpolation=cv2.INTER_AREA)
        ramp = np.broadcast_to(np.arange(len(true))[:, None], true.shape)
        seen = true > 0
        scores = spearman(map_[seen], true[seen]), spearman(ramp[seen], true[seen])
        found.setdefault(name.split()[0], []).append(scores)
        print(f"| {name} | {scores[0]:.2f} | {scores[1]:.2f} | {seconds:.2f} |")
    means = np.mean([np.mean(scores, 0) for scores in found.values()], 0)
    print(f"| mean of {len(found)} (Redwood's as one) | {means[0]:.2f} | {means[1]:.2f} | |")


if __name__ == "__main__":
    main()
