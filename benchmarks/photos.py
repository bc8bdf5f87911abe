"""How well images of the embedded model keep to the edges and poses of photos, of which it has seen none.

    python benchmarks/photos.py PHOTO|FOLDER... [--count 20] [--poses PHOTO|FOLDER...] [--sheet out/photos.png]

Edges: F1 between the map of a photo and the edges found again on the image, within 2 pixels at 256. Poses: PCK@0.1 of
the joints that a network trained on the model's world reads from the image, for people of some height of whom `detect
pose` finds both ankles and both wrists. With control on the half that reads the prompt, and on both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from controlnet.model.control.strength import Strength
from controlnet.model.nets import load_controlnet
from controlnet.model.registry import TINY
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.tiny.card import STEPS, interval, joint_reader, load_weights
from controlnet.model.tiny.readers import pose_of, user_canny
from controlnet.preprocessors.agreement import edge_f1, pck
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.errors import NothingFoundError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.sheet import contact_sheet
from controlnet.preprocessors.skeleton import JOINTS

POSTER = "a poster of shapes in orange, blue and white"
PERSON = "a person in a red shirt and blue trousers, grey floor, white wall"
ENDS = [JOINTS.index(f"{side} {joint}") for side in ("left", "right") for joint in ("ankle", "wrist")]
TALL = 0.4
"""The least height of a person whose pose is taken, as a share of the photo's."""
PHOTOS = (".jpg", ".jpeg", ".png")

Found = tuple[str, np.ndarray, np.ndarray, np.ndarray]
"""Name, photo, map (H, W, 3) uint8, and what the image is compared with."""


def photos(places: list[Path], size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and the middle square, (size, size, 3) uint8, of every photo."""
    for place in places:
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in PHOTOS) if place.is_dir() else [place]
        for file in files:
            photo, _ = read_image(file.read_bytes(), file.name)
            yield file.name, fit(photo, (size, size))


def edges(places: list[Path], size: int) -> Iterator[Found]:
    for name, photo in photos(places, size):
        map_ = user_canny(photo)
        yield name, photo, map_, map_[..., 0]


def poses(places: list[Path], size: int) -> Iterator[Found]:
    """Photos of one whole person, whose joints are in pixels, (18, 3)."""
    row = find_detector("pose")
    detect = row.ready(row.load_options()())
    for name, photo in photos(places, 2 * size):
        try:
            people = [np.array(person) for person in detect(photo)[1]["keypoints"]]
        except NothingFoundError:
            continue
        if len(people) == 1 and people[0][ENDS, 2].all() and np.ptp(people[0][:18, 1]) >= TALL:
            joints = people[0][:18] * (size, size, 1)
            yield name, fit(photo, (size, size)), pose_of(joints, size), joints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--poses", nargs="*", type=Path, default=[], help="photos of people")
    parser.add_argument("--count", type=int, default=20, help="the most photos of each kind")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="where the reader of joints is kept")
    parser.add_argument("--weights", type=Path, default=TINY)
    parser.add_argument("--sheet", type=Path, default=Path("out/photos.png"))
    args = parser.parse_args()
    base = load_weights(args.weights, torch.device("cpu"))
    size, cells = base.native_size, []
    reader = joint_reader(base, args.runs) if args.poses else None

    def f1(image, edges):
        return edge_f1(user_canny(image)[..., 0], edges, 2 if size >= 256 else 1)

    def joints(image, true):
        return pck(reader.read(image[None])[0], true)

    kinds = [("canny", POSTER, f1, edges(args.photos, size)), ("pose", PERSON, joints, poses(args.poses, size))]
    for kind, prompt, score, found in kinds:
        chosen = [row for row, _ in zip(found, range(args.count), strict=False)]
        if not chosen:
            continue
        net = load_controlnet(args.weights / f"controlnet-{kind}", base.dtype)
        scores, made = {}, {}
        for half in ("cond", "both"):
            requests = [Request(prompt, i, (map_,)) for i, (_, _, map_, _) in enumerate(chosen)]
            nets = [(net, Strength(control_on=half))]
            made[half] = list(generate(base, requests, nets, (size, size), steps=STEPS, batch=10))
            scores[half] = [score(image, row[3]) for image, row in zip(made[half], chosen, strict=True)]
            mean, low, high = interval(np.array(scores[half]))
            print(f"{kind}, {len(chosen)} photos, control on {half}: {mean:.3f} ({low:.3f} to {high:.3f})", flush=True)
        for i, (name, photo, map_, _) in enumerate(chosen):
            told = [f"{half} {scores[half][i]:.2f}" for half in made]
            print(f"  {name}: {', '.join(told)}", file=sys.stderr)
            images = [images[i] for images in made.values()]
            cells += [(photo, name), (map_, ""), *zip(images, told, strict=True)]
    write_file(args.sheet, png_bytes(contact_sheet(cells, 8, size)))
    print(f"look at {args.sheet}")


if __name__ == "__main__":
    main()
