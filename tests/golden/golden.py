"""What the commands make, as sha256 sums: a rebuilding that means to change nothing is run between two of these.

    python tests/golden/golden.py before.json
    python tests/golden/golden.py after.json --against before.json

Maps of every detector that is here, images of `tiny`, a training run and the same one resumed, a conversion both ways,
and every help page. One thread and float32; the sums hold on one machine with one set of libraries only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file

PHOTOS = {"astronaut": skimage.data.astronaut, "coffee": skimage.data.coffee, "chelsea": skimage.data.chelsea}
KINDS = ("canny", "pose", "depth", "normal", "softedge", "scribble", "lineart")
PROMPT = "a large red cube, grey floor, blue wall"
CANNY, POSE, DEPTH = "maps/astronaut.canny.png", "maps/astronaut.pose.png", "maps/coffee.depth.png"
IMAGES = {
    "plain": ["--cond", CANNY],
    "prompt mode": ["--cond", CANNY, "--mode", "prompt"],
    "control mode": ["--cond", CANNY, "--mode", "control"],
    "guess mode": ["--cond", CANNY, "--mode", "guess"],
    "two conditions": ["--cond", f"{POSE},scale=0.8", "--cond", DEPTH, "--size", "128x128"],
    "window": ["--cond", f"{CANNY},start=0.2,end=0.7"],
    "schedule": ["--cond", CANNY, "--scheduler", "unipc", "--guidance", "4", "--steps", "7"],
    "region": ["--cond", f"{CANNY},region=region.png", "--cond", f"{CANNY},weighting=soft"],
    "batch of four": ["--cond", CANNY, "--num", "4", "--negative", "a blue sphere"],
    "photo": ["--cond", "photos/coffee.png,detect=canny", "--size", "192x128"],
    "low memory": ["--cond", CANNY, "--low-memory"],
    "no condition": ["--control-on", "cond", "--size", "128"],
}
JOBS = [
    {"cond": CANNY, "prompt": "a blue sphere"},
    {"cond": [POSE, f"{DEPTH},end=0.5"], "prompt": PROMPT, "num": 2, "seed": 20, "guidance": 3},
    {"cond": DEPTH, "prompt": "a green cone", "mode": "guess", "scheduler": "euler", "seed": 30},
]
PAGES = [[], ["detect"], *(["detect", kind] for kind in (*KINDS, "all")), ["generate"], ["replay"], ["score"],
         ["train"], ["status"], ["dataset"], ["dataset", "check"], ["dataset", "build"], ["models"],
         *(["models", name] for name in ("list", "pull", "verify", "show", "convert", "use"))]  # fmt: skip


class Golden:
    def __init__(self, folder: Path):
        self.at = folder
        self.sums: dict[str, str] = {}

    def run(self, *args: str, fails: bool = False) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb",
                       "XDG_CONFIG_HOME": str(self.at / "config")}  # fmt: skip
        command = [sys.executable, "-m", "controlnet.cli.main", *args]
        done = subprocess.run(command, cwd=self.at, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 or fails, f"{args}: {done.stderr}"
        return done.stdout

    def note(self, name: str, data: bytes) -> None:
        self.sums[name] = hashlib.sha256(data).hexdigest()

    def note_pixels(self, name: str, path: Path) -> None:
        """Pixels and what the record says, without what no two runs share."""
        with Image.open(path) as image:
            self.note(f"{name}: pixels", np.asarray(image).tobytes())
            texts = "\n".join(f"{key}={value}" for key, value in sorted(image.info.items()) if isinstance(value, str))
        # Neither folders of this run nor where the package lies.
        texts = re.sub(r'"net": "[^"]*/model/', '"net": "model/', texts).replace(str(self.at), "")
        self.note(f"{name}: record", texts.encode())

    def note_tensors(self, name: str, path: Path) -> None:
        for key, tensor in sorted(load_file(path).items()):
            self.sums[name] = hashlib.sha256(
                f"{self.sums.get(name)} {key} {tensor.dtype} {tuple(tensor.shape)}".encode()
                + tensor.contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()

    def help_pages(self) -> None:
        for page in PAGES:
            self.note(f"help {' '.join(page)}", self.run(*page, "--help").encode())

    def maps(self) -> None:
        (self.at / "photos").mkdir()
        for name, photo in PHOTOS.items():
            Image.fromarray(photo()).save(self.at / f"photos/{name}.png")
        Image.fromarray(np.pad(np.full((64, 128), 255, np.uint8), ((0, 64), (0, 0)))).save(self.at / "region.png")
        for kind in KINDS:
            self.run("detect", kind, "photos", "-o", "maps", "-q", fails=kind == "pose")  # nobody in two of them
            for name in PHOTOS if kind != "pose" else ["astronaut"]:
                self.note_pixels(f"map {kind} {name}", self.at / f"maps/{name}.{kind}.png")
        self.run("detect", "canny", "photos/coffee.png", "-o", "small", "--size", "256", "--json", "-q")
        self.note_pixels("map canny small", self.at / "small/coffee.canny.png")

    def images(self) -> None:
        common = ["--prompt", PROMPT, "--seed", "7", "--steps", "5", "--dtype", "float32", "--offline", "-q"]
        for name, args in IMAGES.items():
            out = self.at / "images" / name
            given = {word for word in args if word.startswith("--")}
            rest = [
                w for flag, w in zip(common[::2], common[1::2], strict=False) if flag not in given for w in (flag, w)
            ]
            self.run("generate", *args, *rest, "-q", "-o", str(out))
            for path in sorted(out.glob("*.png")):
                self.note_pixels(f"image {name} {path.name}", path)
        (self.at / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in JOBS))
        self.run("generate", "--jobs", "jobs.jsonl", *common[2:], "-o", "images/jobs")
        for path in sorted((self.at / "images/jobs").glob("*.png")):
            self.note_pixels(f"image jobs {path.name}", path)

    def scores(self) -> None:
        image = next((self.at / "images/plain").glob("*.png"))
        score = json.loads(self.run("score", str(image), "--json", "--offline"))
        self.note("score", json.dumps({k: v for k, v in score.items() if k != "image"}, sort_keys=True).encode())
        self.run("replay", str(image))

    def training(self) -> None:
        for i in range(12):
            rng = np.random.default_rng(i)
            photo = np.full((96, 96, 3), rng.integers(0, 120, 3), np.uint8)
            x, y = rng.integers(4, 60, 2)
            photo[y : y + 24, x : x + 24] = rng.integers(150, 255, 3)
            (self.at / "training").mkdir(exist_ok=True)
            Image.fromarray(photo).save(self.at / f"training/{i}.png")
            (self.at / f"training/{i}.txt").write_text(f"a cube, floor {i}")
        settings = ["size=64", "batch_size=2", "log_every=1", "validate_every=10", "held_out=2", "pictures=1"]
        rest = ["-q", "--offline", *(word for setting in settings for word in ("--set", setting))]
        rest += ["--set", "decay_fraction=0", "--set", "save_every=0.001", "--set", "learning_rate=1e-4"]
        self.run("train", "training", "-o", "whole", *rest, "--set", "max_steps=20")
        self.run("train", "training", "-o", "cut", *rest, "--set", "max_steps=10")
        self.run("train", "training", "-o", "cut", "--resume", "--force", *rest, "--set", "max_steps=20")
        for run in ("whole", "cut"):
            rows = [json.loads(line) for line in (self.at / run / "log.jsonl").read_text().splitlines()]
            kept = [{k: v for k, v in row.items() if k in ("step", "loss", "validation_loss", "control_gap", "lr")}
                    for row in rows]  # fmt: skip
            if run == "cut":
                kept = [row for row in kept if row["step"] > 10]
            self.note(f"training {run}: log", json.dumps(kept).encode())
            self.note_tensors(f"training {run}: net", self.at / run / "diffusion_pytorch_model.safetensors")
        status = json.loads(self.run("status", "whole", "--json"))
        self.note("training: verdict", json.dumps(status.get("verdict")).encode())

    def dataset(self) -> None:
        self.run("dataset", "build", "training", "-o", "built", "--size", "64", "-q")
        for path in sorted((self.at / "built").rglob("*.*")):
            self.note(f"dataset {path.relative_to(self.at)}", path.read_bytes())

    def conversion(self) -> None:
        net = self.at / "whole"
        self.run("models", "convert", str(net), "there.safetensors", "--to", "original")
        self.note_tensors("converted there", self.at / "there.safetensors")
        self.run("models", "convert", "there.safetensors", "back", "--to", "diffusers")
        self.note_tensors("converted back", self.at / "back/diffusion_pytorch_model.safetensors")

    def all(self, only: str = "") -> dict[str, str]:
        parts = (self.help_pages, self.maps, self.images, self.scores, self.training, self.dataset, self.conversion)
        for part in parts:
            if not only or part.__name__ in only.split(","):
                part()
            print(f"{part.__name__}: {len(self.sums)} sums", file=sys.stderr, flush=True)
        return self.sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier file; exit 1 where sums differ")
    parser.add_argument("--only", default="", help="parts, with commas: help_pages, maps, images, ...")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        sums = Golden(Path(folder)).all(args.only)
        if os.environ.get("GOLDEN_KEEP"):
            shutil.copytree(folder, os.environ["GOLDEN_KEEP"], dirs_exist_ok=True)
    args.out.write_text(json.dumps(sums, indent=1) + "\n")
    if args.against:
        before = json.loads(args.against.read_text())
        differ = sorted(name for name in before.keys() | sums.keys() if before.get(name) != sums.get(name))
        print("\n".join(differ) or f"all {len(sums)} sums are equal")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
