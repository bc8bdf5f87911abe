"""Whole-process time of `controlnet --help` and `controlnet detect canny`, beside what one would write instead.

    python benchmarks/detect.py

Equal work: one photo at 512 pixels, file in, PNG file out. Each command runs once unmeasured, then RUNS times in turn
with the others; medians and ratios are printed as a table.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 9
AUX = """
import sys
from PIL import Image
from controlnet_aux import CannyDetector
image = CannyDetector()(Image.open(sys.argv[1]), detect_resolution=512, image_resolution=512)
image.save(sys.argv[2])
"""
OPENCV = """
import sys, cv2
cv2.imwrite(sys.argv[2], cv2.Canny(cv2.imread(sys.argv[1]), 100, 200))
"""


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's machine keeps what it compiled
    import skimage.data
    from PIL import Image

    program = shutil.which("controlnet", path=str(Path(sys.executable).parent)) or sys.exit(
        "controlnet is not installed"
    )
    with tempfile.TemporaryDirectory() as name:
        photo, out = str(Path(name) / "photo.png"), str(Path(name) / "out.png")
        Image.fromarray(skimage.data.astronaut()).save(photo)
        commands = {
            "controlnet --help": [program, "--help"],
            "controlnet detect canny": [program, "detect", "canny", photo, "-o", out, "--overwrite"],
            "a script with cv2 alone": [sys.executable, "-c", OPENCV, photo, out],
            "a script with controlnet_aux": [sys.executable, "-W", "ignore", "-c", AUX, photo, out],
        }
        times: dict[str, list[float]] = {key: [] for key in commands}
        for run in range(RUNS + 1):
            for key, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                if run:
                    times[key].append(time.perf_counter() - start)
    reference = statistics.median(times["controlnet detect canny"])
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {RUNS} runs\n")
    print("| command | median s | min s | times `detect canny` |\n|---|---|---|---|")
    for key, values in times.items():
        median = statistics.median(values)
        print(f"| {key} | {median:.2f} | {min(values):.2f} | {median / reference:.2f} |")


if __name__ == "__main__":
    main()
