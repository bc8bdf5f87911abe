"""The main job on one photo: edges of a public-domain picture, three images by `tiny`, and a contact sheet.

    python examples/demo.py out/demo

Runs the same commands that a user types; a copy of each is printed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

PROMPTS = (
    "a person standing in a white shirt and grey trousers, red floor, black wall",
    "a person standing in a red shirt and blue trousers, yellow floor, cyan wall",
    "a person standing in an orange shirt and black trousers, blue floor, white wall",
)


def command(*args: str) -> str:
    """Run `controlnet ARGS`, show it, give its standard output."""
    print("$ controlnet", shlex.join(args))
    run = subprocess.run([sys.executable, "-m", "controlnet.cli.main", *args], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(run.returncode)
    return run.stdout.strip()


def main(folder: Path) -> None:
    import skimage.data
    from controlnet.preprocessors.images import png_bytes, read_image, write_file
    from controlnet.preprocessors.sheet import contact_sheet
    from PIL import Image

    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    photo = folder / "rocket.png"
    Image.fromarray(skimage.data.rocket()).save(photo)  # public domain: NASA / SpaceX
    map_ = command("detect", "canny", str(photo), "--auto", "--overwrite")
    files = [(photo, "photo"), (Path(map_), "controlnet detect canny --auto")]
    for i, prompt in enumerate(PROMPTS):
        image = command(
            "generate",
            "--cond",
            map_,
            "--prompt",
            prompt,
            "--seed",
            str(i),
            "-o",
            f"{folder}/image-{i}.png",
            "--overwrite",
        )
        files.append((Path(image), prompt))
    sheet = contact_sheet([(read_image(path.read_bytes(), str(path))[0], text) for path, text in files], columns=5)
    write_file(folder / "sheet.png", png_bytes(sheet))
    print(f"\npictures: {folder}/   all on one sheet: {folder}/sheet.png   ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo"))
