"""How often is a warning of a wrong condition right, and how often is it given without cause?

    python benchmarks/doubts.py PHOTOS

Right maps are made of the photos, wrong ones are the right ones with one fault each. A row is what a map has, a column
what is told of it; the last two columns are maps with nothing told, and, where `controlnet check --fix` mends it, how
many have nothing told afterwards.
"""

import argparse
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from controlnet.model.work.maps import expand
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.doubts import doubts_of, mend
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.kinds import PALETTE, kind_named
from controlnet.preprocessors.palette import coloured
from controlnet.preprocessors.stage_one import stage_one

KINDS = ("canny", "softedge", "scribble", "lineart", "pose", "depth", "normal", "seg", "tile", "recolor")
GROUP = {
    **dict.fromkeys(("canny", "softedge", "scribble", "lineart"), "lines"), "pose": "pose", "depth": "depth",
    "normal": "normal", "seg": "seg", "tile": "picture", "recolor": "picture",
}  # fmt: skip


def greyed(map_: np.ndarray) -> np.ndarray:
    """As someone gets it who sends a map through a JPEG of half the size."""
    small = cv2.resize(map_, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), map_.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def classes(photo: np.ndarray) -> np.ndarray:
    """A map of classes with the photo's own outlines: no network for them is on this machine."""
    small = cv2.pyrMeanShiftFiltering(cv2.resize(photo, (256, 256)), 12, 30)
    levels = (cv2.cvtColor(small, cv2.COLOR_RGB2GRAY) // 26) * 13 + 3
    return coloured(cv2.resize(levels, (512, 512), interpolation=cv2.INTER_NEAREST) % 150)


def in_colours(map_: np.ndarray) -> np.ndarray:
    return cv2.applyColorMap(map_[..., 0], cv2.COLORMAP_VIRIDIS)[..., ::-1]


def on_nothing(condition: Condition) -> Condition:
    """The same on a transparent ground, as it is read: over white."""
    alpha = condition.rgb.max(axis=2)
    over = condition.rgb + (255 - alpha[..., None].astype(int))
    return replace(condition, map=over.clip(0, 255).astype(np.uint8), alpha=alpha)


FAULTS = {
    "inverted lines": ("lines", lambda m, photo: 255 - m),
    "grey lines": ("canny", lambda m, photo: greyed(m)),
    "doubled lines": ("canny", lambda m, photo: np.repeat(canny(m)[..., None], 3, 2)),
    "no line map": ("lines", lambda m, photo: photo),
    "no skeleton": ("pose", lambda m, photo: photo),
    "red and blue exchanged": ("pose normal seg", lambda m, photo: m[..., ::-1]),
    "empty condition": ("lines pose depth normal seg picture", lambda m, photo: np.zeros_like(m)),
    "reversed depth": ("depth", lambda m, photo: 255 - m),
    "coloured depth": ("depth", lambda m, photo: in_colours(m)),
    "no normal map": ("normal", lambda m, photo: photo),
    "colours beyond the palette": ("seg", lambda m, photo: greyed(m)),
}
"""Fault -> (kinds or groups of kinds that can have it, what makes it of a right map and its photo)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--most", type=int, default=100, help="photos to look at")
    args = parser.parse_args()
    told: dict[str, Counter] = defaultdict(Counter)
    count: Counter = Counter()
    mended: Counter = Counter()

    def look(name: str, condition: Condition) -> None:
        count[name] += 1
        found = [doubt.what for doubt in doubts_of(condition)]
        told[name].update(found or ["nothing"])
        map_, done = mend(condition)
        if done:
            mended[name] += not doubts_of(replace(condition, map=map_, alpha=None))

    for path in expand([str(args.photos)], True)[: args.most]:
        photo = stage_one(path, "ip2p").map
        for kind in KINDS:
            right = right_map(path, photo, kind)
            if right is None:
                continue
            look(f"right {GROUP[kind]}", right)
            for fault, (kinds, spoil) in FAULTS.items():
                if {kind, GROUP[kind]} & set(kinds.split()):
                    look(fault, replace(right, map=np.ascontiguousarray(spoil(right.rgb, photo)), people=None))
            if GROUP[kind] in ("lines", "pose"):
                look("transparency", on_nothing(right))
    write(told, count, mended)


def right_map(path: str, photo: np.ndarray, kind: str) -> Condition | None:
    """A right map of a photo; None where nobody is in it."""
    if kind_named(kind).form == PALETTE:
        return Condition(classes(photo), kind)
    try:
        return replace(stage_one(path, kind), record={})
    except ControlNetError:
        return None


def write(told: dict[str, Counter], count: Counter, mended: Counter) -> None:
    names = [*(name for name in count if name.startswith("right")), *FAULTS, "transparency"]
    print("| what a map has | maps | what is told of it | nothing | well after --fix |\n|---|---|---|---|---|")
    for name in names:
        if not count[name]:
            continue
        words = ", ".join(f"{what} {n / count[name]:.0%}" for what, n in told[name].most_common() if what != "nothing")
        after = f"{mended[name] / count[name]:.0%}" if mended[name] else ""
        print(f"| {name} | {count[name]} | {words} | {told[name]['nothing'] / count[name]:.0%} | {after} |")


if __name__ == "__main__":
    main()
