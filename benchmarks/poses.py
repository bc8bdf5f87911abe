"""Object keypoint similarity (COCO's OKS) of the people found in photos with marked key points.

    python benchmarks/poses.py [MARKS.json...] [--captioned FOLDER] [--detector blazepose]

MARKS.json lies beside its photos: COCO's format (CrowdPose, OCHuman too), or MPII's list. A person's score is the best
one of everyone found; a joint that is marked and that the detector leaves out counts 0, and joints that only one of the
skeletons has are left aside. Where no area is marked it is 0.53 of the box, as CrowdPose's evaluation takes it.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
from controlnet.preprocessors.agreement import oks
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.errors import NothingFoundError
from controlnet.preprocessors.images import read_image
from controlnet.preprocessors.skeleton import JOINTS

KNOWN = {name for name in JOINTS if name != "neck"}
SURE = r"\b(man|woman|boy|girl|person|player|child)\b"
"""Words of captions that tell of somebody."""
PEOPLE = (
    r"\b(men|women|people|boys|girls|children|kids?|players|baby|lady|ladies|guys?|couple|crowd|toddler|infant|adults?|"
    r"team|group|band|someone|somebody|friends|family|owner|individual|human|hands?|legs?|he|she|his|her|they|their|"
    r"\w+(?:boarder|climber|surfer|rider|skier|runner|swimmer|dancer|worker|driver|racer|performer|golfer|biker|hiker)|"
    r"surfer|climber|hiker|biker|rider|skier|runner|swimmer|bride|dancer|worker|driver|racer|soldier|teenager|\w*cyclist|"
    r"athlete|male|female|officer|police|golfer|fisherman|students?|passengers|audience|jockey|cowboy|wrestlers|diver|"
    r"pedestrians|sledder|acrobat|tourists?|gentleman|son|daughter|mother|father|mom|dad|brother|sister)\b|"
) + SURE
MPII = ("right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle", "", "", "", "", "right wrist",
        "right elbow", "right shoulder", "left shoulder", "left elbow", "left wrist")  # fmt: skip
FULL_BODY = ("shoulder", "hip", "knee", "ankle")

Marked = tuple[dict[str, tuple[float, float]], float]
"""A person: joints that are marked (name -> pixels), and the area."""


def read_marks(path: Path) -> dict[Path, list[Marked]]:
    """Photos and the people marked in them, the largest first."""
    marks = json.loads(path.read_text())
    photos: dict[Path, list[Marked]] = {}

    def person(names, points, box=None, area=None) -> Marked:
        joints = {name: (x, y) for name, (x, y, seen) in zip(names, points, strict=True) if seen > 0 and name in KNOWN}
        if area is None:
            width, height = box if box else np.ptp([p[:2] for p in points], axis=0)
            area = 0.53 * width * height
        return joints, float(area)

    if isinstance(marks, list):
        for entry in marks:
            points = [(*xy, seen) for xy, seen in zip(entry["joints"], entry["joints_vis"], strict=True)]
            photos.setdefault(path.parent / entry["image"], []).append(person(MPII, points))
    else:
        names = [name.replace("_", " ") for name in marks["categories"][0]["keypoints"]]
        for entry in marks["images"]:
            own = [a for a in marks["annotations"] if a["image_id"] == entry["id"]]
            people = [
                person(names, np.reshape(a["keypoints"], (-1, 3)).tolist(), a["bbox"][2:], a.get("area")) for a in own
            ]
            photos[path.parent / entry["file_name"]] = sorted((p for p in people if p[0]), key=lambda p: -p[1])
    return photos


def score(found: np.ndarray, marked: Marked, size: tuple[int, int]) -> float:
    """OKS of a person (18, 3) in fractions of a picture of `size` (width, height) and a marked one."""
    joints, area = marked
    true = np.array([(*joints[name], 1.0) if name in joints else (0.0, 0.0, 0.0) for name in JOINTS])
    return oks(found * (*size, 1), true, area)


def passing_for_people(folder: Path, find) -> tuple[int, int, int, int]:
    """(photos whose captions name nobody, in how many somebody is found; photos whose captions all name somebody, in
    how many nobody is found) of an imagefolder whose metadata.jsonl has `captions`."""
    counts = [0, 0, 0, 0]
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        captions = [caption.lower() for caption in row["captions"]]
        nobody = not any(re.search(PEOPLE, caption) for caption in captions)
        somebody = all(re.search(SURE, caption) for caption in captions)
        if nobody or somebody:
            found = bool(find(read_image((folder / row["file_name"]).read_bytes(), row["file_name"])[0]))
            counts[0] += nobody
            counts[1] += nobody and found
            counts[2] += somebody
            counts[3] += somebody and not found
    return counts[0], counts[1], counts[2], counts[3]


def whole(marked: Marked) -> bool:
    """Are both shoulders, hips, knees and ankles marked?"""
    return all(f"{side} {part}" in marked[0] for side in ("left", "right") for part in FULL_BODY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("marks", type=Path, nargs="*")
    parser.add_argument("--captioned", type=Path, help="also count who is found in photos without people")
    parser.add_argument("--detector")
    args = parser.parse_args()
    row = find_detector("pose", args.detector)
    make = row.ready(row.load_options()())

    def find(image: np.ndarray) -> list[np.ndarray]:
        try:
            return [np.array(person) for person in make(image)[1]["keypoints"]]
        except NothingFoundError:
            return []

    if args.captioned:
        without, false, with_, missed = passing_for_people(args.captioned, find)
        print(
            f"somebody found in {false} of {without} photos without people, nobody in {missed} of {with_} with people\n"
        )
    if not args.marks:
        return
    print("| photo | marked | found | s | OKS, largest person first (joints marked; * the whole body) |")
    print("|---|---|---|---|---|")
    everyone, main_ones = [], []
    for path in args.marks:
        for photo, marked in read_marks(path).items():
            image, _ = read_image(photo.read_bytes(), photo.name)
            start = time.perf_counter()
            people = find(image)
            seconds = time.perf_counter() - start
            scores = [max((score(p, m, image.shape[1::-1]) for p in people), default=0.0) for m in marked]
            everyone += scores
            main_ones += scores[:1] if whole(marked[0]) else []
            told = ", ".join(
                f"{s:.2f} ({len(m[0])}{'*' if whole(m) else ''})" for s, m in zip(scores, marked, strict=True)
            )
            print(f"| {path.parent.name}/{photo.name} | {len(marked)} | {len(people)} | {seconds:.2f} | {told} |")
    print(f"\nmean of {len(everyone)} people: {np.mean(everyone):.2f}")
    print(f"mean of the {len(main_ones)} largest people whose whole body is marked: {np.mean(main_ones):.2f}")


if __name__ == "__main__":
    main()
