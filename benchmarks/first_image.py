"""Where the time of an image by `tiny` goes, from the shell's prompt to the PNG file.

    python benchmarks/first_image.py

Whole processes: the libraries that an image needs, imported and nothing done; `controlnet generate` for one image, and
for five; each once unmeasured, then RUNS times in turn. What a further image costs is a fourth of what four more take.
Then the parts of one `generate`, by clocks around the functions that do them, and the libraries by `-X importtime`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
LIBRARIES = """
from controlnet.model.work.machine import silence_libraries
silence_libraries()
import cv2, numpy, PIL.Image, rich.progress, safetensors.torch, torch, typer
from accelerate import init_empty_weights
from diffusers import AutoencoderTiny, ControlNetModel, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
"""
CLOCKED = [
    ("base loaded", "controlnet.model.work.models", "load_base"),
    ("ControlNet loaded", "controlnet.model.work.models", "load_net"),
    ("hash of the base", "controlnet.model.work.studio", "model_hash"),
    ("hash of the ControlNet", "controlnet.model.work.models", "model_hash"),
    ("condition read and judged", "controlnet.model.work.pictures", "Pictures._placed"),
    ("text encoded", "controlnet.model.base", "Base.encode_text"),
    ("hint encoded", "controlnet.model.control.controlnet", "ControlNet.prepare"),
    ("20 steps", "controlnet.model.sampling.generate", "sample"),
    ("decoded", "controlnet.model.base", "Base.decode"),
    ("PNG", "controlnet.model.work.studio", "Image.png"),
]
INSIDE = """
import importlib, json, sys, time
from controlnet.preprocessors.imports import share_cores
share_cores()
started = time.perf_counter()
exec(sys.argv[1])
imported = time.perf_counter() - started
clocked, arguments = json.loads(sys.argv[2]), sys.argv[3:]
spent = {"libraries imported": imported}
def clock(name, holder, attribute):
    function = getattr(holder, attribute)
    def timed(*a, **k):
        start = time.perf_counter()
        try:
            return function(*a, **k)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
    setattr(holder, attribute, timed)
for name, module, path in clocked:
    holder = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    clock(name, holder, attribute)
from controlnet.cli.main import app
try:
    app(arguments)
except SystemExit:
    pass
spent["everything"] = time.perf_counter() - started
never = [name for name, *_ in clocked if name not in spent]
assert not never, f"never called: {never}"
print(json.dumps(spent))
"""


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def slowest_imports(count: int = 6) -> list[tuple[str, float]]:
    """Top-level packages and the seconds that importing all of each takes, by -X importtime."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", LIBRARIES], check=True, capture_output=True, text=True
    ).stderr
    own: dict[str, float] = {}
    for line in told.splitlines():
        if line.startswith("import time:") and "|" in line and "self [us]" not in line:
            microseconds, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
            package = name.split(".")[0]
            own[package] = own.get(package, 0.0) + int(microseconds) / 1e6
    return sorted(own.items(), key=lambda item: -item[1])[:count]


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's machine keeps what it compiled
    import torch
    from controlnet.model.tiny.readers import user_canny
    from controlnet.model.tiny.world.render import render
    from controlnet.model.tiny.world.scenes import make_scene
    from controlnet.model.tiny.world.shards import HELD_OUT
    from controlnet.preprocessors.images import png_bytes

    scene = make_scene(HELD_OUT + 1)
    with tempfile.TemporaryDirectory() as name:
        condition = Path(name) / "scene.canny.png"
        condition.write_bytes(png_bytes(user_canny(render([scene], 256).images[0].numpy())))
        asked = ["generate", "--cond", str(condition), "--prompt", scene.caption, "-o", f"{name}/out/",
                 "--seed", "0", "--overwrite", "--quiet"]  # fmt: skip
        program = [sys.executable, "-m", "controlnet.cli.main", *asked]
        commands = {
            "libraries": [sys.executable, "-c", LIBRARIES], "one image": program, "five images": [*program, "-n", "5"],
        }  # fmt: skip
        times: dict[str, list[float]] = {key: [] for key in commands}
        for run in range(RUNS + 1):
            for key, command in commands.items():
                spent = seconds(command)
                if run:
                    times[key].append(spent)
        inside = [
            json.loads(subprocess.run(
                [sys.executable, "-c", INSIDE, LIBRARIES, json.dumps(CLOCKED), *asked], check=True, capture_output=True,
                text=True,
            ).stdout.splitlines()[-1])
            for _ in range(RUNS)
        ]  # fmt: skip
    libraries, one, five = (statistics.median(values) for values in times.values())
    parts = {key: statistics.median(run[key] for run in inside) for key in inside[0]}
    everything = parts.pop("everything")
    print(
        f"{os.cpu_count()} cores, torch {torch.__version__}, {RUNS} runs, medians\n\n| whole process | s |\n|---|---|"
    )
    print(f"| the libraries, imported and nothing done | {libraries:.2f} |")
    print(f"| `generate`, one image | {one:.2f} |\n| more than the bare import | {one - libraries:.2f} |")
    print(f"| a further image (of four more) | {(five - one) / 4:.2f} |\n")
    print(f"| inside `generate`, one image | s |\n|---|---|\n| everything | {everything:.2f} |")
    for key, value in parts.items():
        print(f"| {key} | {value:.2f} |")
    print(f"| the rest | {everything - sum(parts.values()):.2f} |\n\n| library, all of its modules | s |\n|---|---|")
    for package, value in slowest_imports():
        print(f"| {package} | {value:.2f} |")


if __name__ == "__main__":
    main()
