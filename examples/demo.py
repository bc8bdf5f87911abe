"""What ControlNet does, on three photos: edges, a pose and depth become images of `tiny`, on one sheet and one page.

    python examples/demo.py out/demo [--person photo-of-a-whole-person.jpg]

Runs the commands that a user types, and prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

# All of them come with scikit-image. The horse and the coffee (Rachel Michetti) are CC0, the astronaut is NASA's and in
# the public domain.
PHOTOS = {"canny": "horse", "pose": "astronaut", "depth": "coffee"}
PROMPTS = {
    "canny": ("a poster in orange and blue", "a poster in black and yellow"),
    "pose": (
        "a person standing in a white shirt and red trousers, brown floor, blue wall",
        "a person walking in a yellow shirt and black trousers, green floor, cyan wall",
    ),
    "depth": ("a large white cylinder, brown floor, grey wall", "a large white sphere, orange floor, brown wall"),
}
SAID = {
    "canny": "its edges: where one thing ends", "pose": "its pose: where a person's joints are",
    "depth": "its depth: what is near",
}  # fmt: skip
NO_WEIGHTS = 5
"""Exit code of a command that lacks a model, here without a network at the first use of a detector."""


def command(*args: str) -> list[str]:
    """Run `controlnet ARGS` and show it; the lines of its standard output, none where weights are missing."""
    print("$ controlnet", shlex.join(args), flush=True)
    run = subprocess.run([sys.executable, "-m", "controlnet.cli.main", *args], stdout=subprocess.PIPE, text=True)
    if run.returncode not in (0, NO_WEIGHTS):
        sys.exit(run.returncode)
    return run.stdout.split("\n")[:-1]


def step_back(points: Path) -> None:
    """The same people on a canvas twice as large: a portrait's pose becomes one that shows the whole person."""
    told = json.loads(points.read_text())
    width, height = told["canvas_width"], told["canvas_height"]
    for person in told["people"]:
        flat = person["pose_keypoints_2d"]
        for i in range(0, len(flat), 3):
            if flat[i + 2] > 0:
                flat[i : i + 2] = flat[i] + width / 2, flat[i + 1] + height / 6
    told |= {"canvas_width": 2 * width, "canvas_height": 2 * height}
    points.write_text(json.dumps(told))


def picture_of(kind: str) -> object:
    """A photo of scikit-image, (H, W, 3) uint8."""
    import numpy as np
    import skimage.data

    picture = getattr(skimage.data, PHOTOS[kind])()
    if kind != "canny":
        return picture
    above = (picture.shape[1] - picture.shape[0]) // 2  # the horse is drawn black on white, wider than high
    return np.repeat(np.pad(255 * np.uint8(picture), ((above, above), (0, 0)), constant_values=255)[..., None], 3, 2)


def detect(kind: str, photo: Path, is_portrait: bool) -> list[str]:
    """The map of a photo: its path, or nothing where weights are missing."""
    if not is_portrait:
        return command("detect", kind, str(photo), "--overwrite")
    points = photo.with_suffix(".json")
    if not command("detect", "pose", str(photo), "--keypoints", str(points), "--overwrite"):
        return []
    step_back(points)
    return command("detect", "pose", str(points), "--overwrite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/demo"))
    parser.add_argument("--person", type=Path, help="a photo of a whole person instead of the astronaut's portrait")
    args = parser.parse_args()
    folder: Path = args.folder
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.images import png_bytes, read_image
    from controlnet.preprocessors.sheet import contact_sheet

    started = time.perf_counter()
    print("1. Photos become condition maps: edges, a pose, depth.")
    cells: list[tuple[Path, str]] = []
    jobs = []
    for kind, name in PHOTOS.items():
        photo = folder / f"{name}.png"
        picture = picture_of(kind)
        person, is_portrait = args.person if kind == "pose" else None, kind == "pose" and not args.person
        if person:
            photo = folder / f"{person.stem}.png"
            picture, _ = read_image(person.read_bytes(), str(person))
        write_file(photo, png_bytes(picture))
        maps = detect(kind, photo, is_portrait)
        if not maps:
            continue
        cells += [(photo, "a photo"), (Path(maps[0]), SAID[kind] + ", seen from further back" * is_portrait)]
        for seed, prompt in enumerate(PROMPTS[kind]):
            out = folder / "images" / f"{kind}-{seed}.png"
            jobs.append({"cond": maps, "prompt": prompt, "seed": seed, "out": str(out)})
            cells.append((out, f"{'the same map and ' if seed else ''}the words: {prompt}"))

    print("\n2. Maps and prompts become images; the first one by itself, then all of them as jobs.")
    (first, *rest) = jobs
    asked = ["--cond", *first["cond"], "--prompt", first["prompt"], "--seed", "0", "-o", first["out"], "--overwrite"]
    command("generate", *asked)
    print(f"   the first image, after {time.perf_counter() - started:.0f} s: {first['out']}")
    write_file(folder / "jobs.jsonl", "".join(json.dumps(job) + "\n" for job in rest).encode())
    command("generate", "--jobs", str(folder / "jobs.jsonl"), "--overwrite")

    print("\n3. Did the images keep to the maps? A page with scores.")
    page = command("report", str(folder / "images"))
    sheet = contact_sheet([(read_image(path.read_bytes(), str(path))[0], text) for path, text in cells], columns=4)
    write_file(folder / "sheet.png", png_bytes(sheet))
    seconds = time.perf_counter() - started
    opened = sys.stdout.isatty() and bool(os.environ.get("DISPLAY") or sys.platform == "darwin")
    if opened:
        webbrowser.open((folder / "sheet.png").resolve().as_uri())
    print("\nMaps say where, words say what. tiny painted this, which knows a small world of shapes alone;")
    print("Stable Diffusion paints anything: controlnet models pull sd15 sd15-canny, then --base sd15.")
    print(f"\n{seconds:.0f} s. The page: {page[0]}\nAll on one sheet: {folder / 'sheet.png'}")


if __name__ == "__main__":
    main()
