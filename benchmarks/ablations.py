"""What prompt dropout and the size of the data do (paper, 3.4 and Fig. 10): `make ablations`, on `tiny`.

    python benchmarks/ablations.py [--steps 1500] [--scenes 100] [--runs runs/ablations]

Canny ControlNets from scratch, equal seed and steps: half of the prompts emptied or none, from 3,000 scenes; 100, 1,000
and 10,000 scenes. Zero, Gaussian and lite are `convergence.py`'s, judged here too where its runs are there. Each run is
a plain `controlnet train`; a run that is there is gone on with. Judged on held-out scenes of the world by the card's F1
of edges found again, with the scenes' own prompts and with empty ones.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
from controlnet.model.base import load_base
from controlnet.model.checkpoint import load_controlnet
from controlnet.model.tiny.card import interval, make_images
from controlnet.model.tiny.dataset import HELD_OUT, world, world_photos
from controlnet.model.tiny.fidelity import JointReader, measures
from controlnet.model.training.report import read_run

SCENES = 3000
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "half of the prompts emptied": (SCENES, []),
    "no prompt emptied": (SCENES, ["prompt_dropout=0"]),
    "100 scenes": (100, []),
    "1,000 scenes": (1000, []),
    "10,000 scenes": (10_000, []),
}
CONVERGENCE = {"Gaussian convolutions": "gaussian", "lite": "lite"}
"""Runs of `make convergence`, by their folders."""


def trained(name: str, folder: Path, photos: Path, settings: list[str]) -> Path:
    """The run's folder, trained to its end."""
    run = folder / name.replace(" ", "-").replace(",", "")
    command = [sys.executable, "-m", "controlnet.cli.main", "train", str(photos), "--kind", "canny", "--base", "tiny"]
    there = ["--resume"] if (run / "run.json").is_file() else []
    subprocess.run([*command, "-o", str(run), *(f"--set={text}" for text in settings), *there],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes to judge on")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--convergence", type=Path, default=Path("runs/convergence"), help="runs to judge besides")
    args = parser.parse_args()
    runs: dict[str, Path] = {}
    with contextlib.redirect_stdout(sys.stderr):
        for name, (count, changes) in VARIANTS.items():
            photos = world_photos(args.runs / "photos" / str(count), count, 128)
            runs[name] = trained(name, args.runs, photos, [f"max_steps={args.steps}", *changes])
        runs |= {name: args.convergence / folder for name, folder in CONVERGENCE.items()}
        base = load_base("tiny")
        held_out = world(args.runs / "photos" / "held-out", args.scenes, base.native_size, HELD_OUT)
    canny = measures(JointReader())[0]
    rows = np.arange(args.scenes)
    conditions = [canny.condition(held_out, row) for row in range(args.scenes)]
    print("| network | loss, start to end | control gap | F1, own prompts | F1, empty prompts |\n|---|---|---|---|---|")
    for name, folder in runs.items():
        if not (folder / "run.json").is_file():
            print(f"| {name} | not trained here: make convergence | | | |")
            continue
        net = load_controlnet(folder, base.dtype)
        cells = []
        for prompts in (held_out.captions, [""] * args.scenes):
            images = make_images(base, net, prompts, conditions)
            mean, low, high = interval(np.array(canny.scores(images, held_out, rows, conditions)))
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        first, last = read_run(folder).validations[0], read_run(folder).validations[-1]
        print(f"| {name} | {first['validation_loss']:.4f} to {last['validation_loss']:.4f} | "
              f"{last['control_gap']:.4f} | {' | '.join(cells)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
