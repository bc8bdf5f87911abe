"""Object keypoint similarity (COCO's OKS) of the people found in photos with marked key points.

    python benchmarks/poses.py person_keypoints.json PHOTOS [--detector blazepose]

A person's score is the best one of everyone found; a joint that COCO marks and the detector leaves out counts 0, and
joints that only one of the two skeletons has are left aside.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from controlnet.preprocessors.errors import NothingFoundError
from controlnet.preprocessors.images import read_image
from controlnet.preprocessors.registry import find_detector
from controlnet.preprocessors.skeleton import JOINTS

NAMES = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)  # fmt: skip
SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000
"""COCO's names and tolerances of its joints."""


def oks(person: np.ndarray, marked: dict, size: tuple[int, int]) -> float:
    """Of a person (18, 3) in fractions of a picture of `size` (width, height) and one of COCO's annotations."""
    points = np.array(marked["keypoints"], float).reshape(17, 3)
    mine = person[[JOINTS.index(name) for name in NAMES]]
    distance = ((mine[:, :2] * size - points[:, :2]) ** 2).sum(1)
    scores = np.where(mine[:, 2] > 0, np.exp(-distance / (2 * marked["area"] * (2 * SIGMAS) ** 2)), 0)
    return float(scores[points[:, 2] > 0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--detector")
    args = parser.parse_args()
    row = find_detector("pose", args.detector)
    make = row.ready(row.load_options()())
    marked = json.loads(args.annotations.read_text())
    print("| photo | people marked | found | s | OKS, largest person first (joints marked) |\n|---|---|---|---|---|")
    everyone = []
    for entry in marked["images"]:
        image, _ = read_image((args.photos / entry["file_name"]).read_bytes(), entry["file_name"])
        start = time.perf_counter()
        try:
            people = [np.array(person) for person in make(image)[1]["keypoints"]]
        except NothingFoundError:
            people = []
        seconds = time.perf_counter() - start
        own = [a for a in marked["annotations"] if a["image_id"] == entry["id"] and any(a["keypoints"][2::3])]
        own.sort(key=lambda a: -a["area"])
        scores = [max((oks(p, a, image.shape[1::-1]) for p in people), default=0.0) for a in own]
        everyone += scores
        told = ", ".join(
            f"{score:.2f} ({sum(v > 0 for v in a['keypoints'][2::3])})" for score, a in zip(scores, own, strict=True)
        )
        print(f"| {entry['file_name']} | {len(own)} | {len(people)} | {seconds:.2f} | {told} |")
    print(f"\nmean of {len(everyone)} people: {np.mean(everyone):.2f}")


if __name__ == "__main__":
    main()
