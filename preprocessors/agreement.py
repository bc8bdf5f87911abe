"""How well what is detected on an image agrees with the condition it was made from: lines, depth, poses."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from controlnet.preprocessors.skeleton import JOINTS

SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107,
    "knee": 0.087, "ankle": 0.089, "neck": 0.079,
}  # fmt: skip
"""COCO's tolerance for each joint (cocoeval, github.com/cocodataset/cocoapi). COCO has no neck; it gets a
shoulder's."""


def edge_f1(found: np.ndarray, true: np.ndarray, tolerance: int = 0) -> float:
    """F1 of two line maps (H, W) in {0, 255}: a pixel counts as matched when the other map has one within `tolerance`
    (in the maximum norm). 1 for two empty maps."""
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    near_true, near_found = cv2.dilate(true, kernel) > 0, cv2.dilate(found, kernel) > 0
    found, true = found > 0, true > 0
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    precision, recall = near_true[found].mean(), near_found[true].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def ssim(found: np.ndarray, true: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two maps (H, W) uint8, as scikit-image computes it."""
    from skimage.metrics import structural_similarity

    side = min(7, *found.shape)
    return float(structural_similarity(found, true, data_range=255, win_size=side - 1 + side % 2))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation over all pixels; 0 if either map is flat."""
    from scipy.stats import spearmanr

    if not np.ptp(a) or not np.ptp(b):
        return 0.0
    return float(spearmanr(a.ravel(), b.ravel()).statistic)


def aligned(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """scale * found + shift, fitted to `true` by least squares (Ranftl et al. 2020, arXiv 1907.01341), since a depth
    map fixes neither number. The scale is never negative: near stays near."""
    x, y = found.astype(np.float64).ravel(), true.astype(np.float64).ravel()
    spread = ((x - x.mean()) ** 2).mean()
    scale = max(0.0, float(((x - x.mean()) * (y - y.mean())).mean() / spread)) if spread else 0.0
    return scale * (found - x.mean()) + y.mean()


def depth_rmse(found: np.ndarray, true: np.ndarray) -> float:
    """Root mean square difference of two depth maps (H, W) uint8 after alignment, in levels of 0 to 255."""
    return float(np.sqrt(np.mean((aligned(found, true) - true) ** 2)))


def pck(found: np.ndarray, true: np.ndarray, share: float = 0.1, among: np.ndarray | None = None) -> float:
    """The share of the visible joints of `true` (18, 3) that `found` places within `share` of the longer side of their
    bounding box (PCK, Yang and Ramanan 2013). `found` is (18, 2 or more), in the same unit; a joint with confidence 0
    in it counts as missed. Of the joints only those `among` (18,) count, by default all."""
    seen = true[:, 2] > 0
    longer = np.ptp(true[seen, :2], axis=0).max()
    seen = seen if among is None else seen & among
    near = np.linalg.norm(found[seen, :2] - true[seen, :2], axis=1) <= share * longer
    return float((near & (found[seen, 2] > 0) if found.shape[1] > 2 else near).mean())


def oks(found: np.ndarray, true: np.ndarray, area: float | None = None) -> float:
    """Object keypoint similarity (COCO) of two people (18, 3) in pixels, over the joints known in `true`. `area` is the
    person's in pixels; by default half of the joints' bounding box, about what a person covers of it."""
    seen = true[:, 2] > 0
    if area is None:
        area = float(np.prod(np.ptp(true[seen, :2], axis=0).clip(1))) / 2
    spread = 2 * np.array([SIGMAS[name.split()[-1]] for name in JOINTS])[seen]
    squared = ((found[seen, :2] - true[seen, :2]) ** 2).sum(1)
    return float((np.exp(-squared / (2 * area * spread**2)) * (found[seen, 2] > 0)).mean())


def match_people(found: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> list[tuple[int | None, int]]:
    """(index in found, or None; index in true) for everyone in `true`, paired so that the sum of OKS is greatest."""
    from scipy.optimize import linear_sum_assignment

    likeness = np.array([[oks(one, other) for one in found] for other in true]).reshape(len(true), len(found))
    partner = {int(row): int(column) for row, column in zip(*linear_sum_assignment(-likeness), strict=True)}
    return [(partner.get(index), index) for index in range(len(true))]
