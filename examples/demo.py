"""The main job on three public-domain photos: edges, a pose and depth become images of `tiny`, and a contact sheet.

    python examples/demo.py out/demo [--person photo-of-a-whole-person.jpg]

Runs the same commands that a user types; a copy of each is printed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

PROMPTS = {
    "canny": (
        "a person standing in a white shirt and grey trousers, red floor, black wall",
        "a person standing in a red shirt and blue trousers, yellow floor, cyan wall",
    ),
    "pose": (
        "a person standing in a white shirt and red trousers, brown floor, blue wall",
        "a person walking in a yellow shirt and black trousers, green floor, cyan wall",
    ),
    "depth": (
        "a large yellow cylinder, grey floor, green wall",
        "a poster of circles in red, yellow, black and white",
    ),
}
NO_WEIGHTS = 5
"""Exit code of a command that lacks a model, here without a network at the first use of a detector."""


def command(*args: str) -> str | None:
    """Run `controlnet ARGS`, show it, give its standard output; None where weights are missing."""
    print("$ controlnet", shlex.join(args))
    run = subprocess.run([sys.executable, "-m", "controlnet.cli.main", *args], stdout=subprocess.PIPE, text=True)
    if run.returncode not in (0, NO_WEIGHTS):
        sys.exit(run.returncode)
    return run.stdout.strip() if run.returncode == 0 else None


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/demo"))
    parser.add_argument("--person", type=Path, help="a photo of a whole person instead of the astronaut's portrait")
    args = parser.parse_args()
    folder: Path = args.folder
    import skimage.data
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.images import png_bytes, read_image
    from controlnet.preprocessors.sheet import contact_sheet

    started = time.perf_counter()
    # All three come with scikit-image: the first two are NASA's (public domain), the third is CC0.
    photos = {"canny": "rocket", "pose": "astronaut", "depth": "coffee"}
    files: list[tuple[Path, str]] = []
    for kind, name in photos.items():
        photo = folder / f"{name}.png"
        picture = getattr(skimage.data, name)()
        if kind == "pose" and args.person:
            photo = folder / f"{args.person.stem}.png"
            picture, _ = read_image(args.person.read_bytes(), str(args.person))
        write_file(photo, png_bytes(picture))
        flags = ["--auto"] if kind == "canny" else []
        if kind == "pose" and not args.person:
            points = folder / f"{name}.json"
            if not command("detect", "pose", str(photo), "--keypoints", str(points), "--overwrite"):
                continue
            step_back(points)
            map_ = command("detect", "pose", str(points), "--overwrite")
        else:
            map_ = command("detect", kind, str(photo), *flags, "--overwrite")
        if not map_:
            continue
        files += [(photo, "photo"), (Path(map_), " ".join(["controlnet detect", kind, *flags]))]
        for seed, prompt in enumerate(PROMPTS[kind]):
            out = str(folder / f"{kind}-{seed}.png")
            image = command(
                "generate", "--cond", map_, "--prompt", prompt, "--seed", str(seed), "-o", out, "--overwrite"
            )
            files.append((Path(image or out), prompt))
    sheet = contact_sheet([(read_image(path.read_bytes(), str(path))[0], text) for path, text in files], columns=4)
    write_file(folder / "sheet.png", png_bytes(sheet))
    print(f"\npictures: {folder}/   all on one sheet: {folder}/sheet.png   ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
