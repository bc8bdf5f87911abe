"""How often is a warning of a wrong condition right, and how often is it given without cause?

    python benchmarks/doubts.py PHOTOS

Right maps are made of the photos by the default detectors; wrong ones are the right ones with a fault: inverted, red
and blue exchanged, flattened, lines made grey by a JPEG of half the size.
"""

import argparse
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from controlnet.model.work.maps import expand
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.doubts import doubts
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.images import read_bytes, read_image
from controlnet.preprocessors.kinds import HARD_LINES, kind_named
from controlnet.preprocessors.stage_one import stage_one

KINDS = ("canny", "softedge", "scribble", "lineart", "pose")


def greyed(map_: np.ndarray) -> np.ndarray:
    """As someone gets it who sends a map through a JPEG of half the size."""
    small = cv2.resize(map_, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), map_.shape[1::-1], interpolation=cv2.INTER_LINEAR)


FAULTS = {
    "inverted lines": (lambda kind: kind_named(kind).is_lines, lambda m: 255 - m),
    "grey lines": (lambda kind: kind_named(kind).form == HARD_LINES, greyed),
    "red and blue exchanged": (lambda kind: kind == "pose", lambda m: m[..., ::-1]),
    "empty condition": (lambda kind: True, lambda m: np.zeros_like(m)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--most", type=int, default=200, help="photos to look at")
    args = parser.parse_args()
    photos = [read_image(read_bytes(path), path)[0] for path in expand([str(args.photos)], True)[: args.most]]
    print("| kind | maps | right ones doubted | " + " | ".join(FAULTS) + " |\n|" + "---|" * (3 + len(FAULTS)))
    for kind in KINDS:
        row = find_detector(kind)
        ready = row.ready(row.load_options()())
        count, false = 0, Counter()
        caught: dict[str, list[bool]] = {fault: [] for fault in FAULTS}
        for photo in photos:
            try:
                map_ = stage_one(photo, ready).rgb
            except ControlNetError:  # nobody in it
                continue
            count += 1
            false.update(doubt.what for doubt in doubts(map_, kind))
            for fault, (applies, spoil) in FAULTS.items():
                if applies(kind):
                    caught[fault].append(fault in [doubt.what for doubt in doubts(spoil(map_), kind)])
        shares = [f"{np.mean(found):.1%}" if found else "" for found in caught.values()]
        doubted = ", ".join(f"{what} {n / count:.1%}" for what, n in false.items()) or "none"
        print(f"| {kind} | {count} | {doubted} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
