"""The paper's claims about inference, on the embedded model and held-out scenes of its world.

    python benchmarks/paper.py [--scenes 100] [--runs runs/tiny]
                               [--parts fidelity,prompts,composition,weightings,trained]

Scores are the card's (model/tiny/readers.py): F1 of edges found again, PCK of joints, rank correlation of depth;
colours are right where the prompt's colour is read from floor, wall and main object. Means with 95 % bootstrap
intervals. "trained" is the record of `make ablations`, which takes hours.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ablations import RECORD
from controlnet.model.base import Base
from controlnet.model.control.strength import Strength
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.registry import TINY
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.tiny.card import BATCH, STEPS, Colours, interval, joint_reader, reconstruct
from controlnet.model.tiny.readers import Measure, measures
from controlnet.model.tiny.world.shards import HELD_OUT, World, world

Table = list[list[str]]


class Bench:
    """The embedded model, its ControlNets, held-out scenes, and what reads images."""

    def __init__(self, scenes: int, runs: Path):
        self.scenes = scenes
        self.base: Base = load_base("tiny")
        self.held_out: World = world(runs / "world", 4 * scenes, self.base.native_size, HELD_OUT)
        self.colours = Colours(world(runs / "world", 1500, self.base.native_size, 0), range(1500))
        self.measures: dict[str, Measure] = {m.kind: m for m in measures(joint_reader(self.base, runs))}
        self.nets = {kind: load_controlnet(TINY / f"controlnet-{kind}", self.base.dtype) for kind in self.measures}

    def rows(self, kind: str) -> np.ndarray:
        return self.measures[kind].rows(self.held_out)[: self.scenes]

    def captions(self, rows: np.ndarray) -> list[str]:
        return [self.held_out.captions[row] for row in rows]

    def conditions(self, kind: str, rows: np.ndarray) -> list[np.ndarray]:
        return [self.measures[kind].condition(self.held_out, int(row)) for row in rows]

    def images(self, prompts: list[str], acting: dict[str, list[np.ndarray]], **strength) -> np.ndarray:
        """(N, H, W, 3): image i from prompt i under the i-th condition of each kind in `acting`, seed i."""
        nets = [(self.nets[kind], Strength(**strength)) for kind in acting]
        requests = [Request(p, i, tuple(c[i] for c in acting.values())) for i, p in enumerate(prompts)]
        return np.stack(list(generate(self.base, requests, nets, steps=STEPS, batch=BATCH[self.base.device.type])))

    def score(self, kind: str, images: np.ndarray, rows: np.ndarray, conditions: list[np.ndarray]) -> str:
        return told(self.measures[kind].scores(images, self.held_out, rows, conditions))

    def colour(self, images: np.ndarray, rows: np.ndarray) -> list[str]:
        """Of floor, wall and main object, as the scenes' own captions name them."""
        return [f"{v[0]:.2f}" for v in self.colours.accuracy(images, self.held_out, rows).values()]


def told(values) -> str:
    mean, low, high = interval(np.asarray(values, float))
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def fidelity(bench: Bench) -> tuple[str, Table]:
    table = [["kind", "true condition", "another scene's", "scale 0", "ceiling: the VAE's reconstruction"]]
    for kind in bench.measures:
        rows = bench.rows(kind)
        prompts, own = bench.captions(rows), bench.conditions(kind, rows)
        made = [
            bench.images(prompts, {kind: own}), bench.images(prompts, {kind: own[1:] + own[:1]}),
            bench.images(prompts, {kind: own}, scale=0.0), reconstruct(bench.base, bench.held_out.images[rows]),
        ]  # fmt: skip
        table.append([kind, *(bench.score(kind, images, rows, own) for images in made)])
    return "How well images keep to their conditions", table


def prompts(bench: Bench) -> tuple[str, Table]:
    """Fig. 8: no prompt, one that says too little, one that says something else, one that says all."""
    table = [["kind", "prompt", "kept to the condition", "floor", "wall", "main object"]]
    for kind in bench.measures:
        rows = bench.rows(kind)
        own, captions = bench.conditions(kind, rows), bench.captions(rows)
        asked = {
            "none": [""] * len(rows), "insufficient: three words of it": [" ".join(c.split()[:3]) for c in captions],
            "conflicting: another scene's": captions[1:] + captions[:1], "perfect: its own": captions,
        }  # fmt: skip
        for name, texts in asked.items():
            images = bench.images(texts, {kind: own})
            table.append([kind, name, bench.score(kind, images, rows, own), *bench.colour(images, rows)])
    return "Prompts (paper, Fig. 8)", table


def composition(bench: Bench) -> tuple[str, Table]:
    """Two conditions of one scene of a person, added unweighted (section 3.4), and each alone."""
    rows = bench.rows("pose")
    texts = bench.captions(rows)
    own = {kind: bench.conditions(kind, rows) for kind in ("pose", "depth")}
    table = [["conditions", "pose kept", "depth kept"]]
    for kinds in (("pose",), ("depth",), ("pose", "depth")):
        images = bench.images(texts, {kind: own[kind] for kind in kinds})
        table.append([" + ".join(kinds), *(bench.score(kind, images, rows, own[kind]) for kind in ("pose", "depth"))])
    return "Two conditions at once (paper, 3.4)", table


def weightings(bench: Bench) -> tuple[str, Table]:
    """Empty prompts: the map must do (section 3.4)."""
    ways = {
        "uniform, both halves": {"control_on": "both"}, "uniform, conditional half": {"control_on": "cond"},
        "resolution, conditional half": {"control_on": "cond", "weighting": "resolution"},
        "guess: soft, conditional half": {"control_on": "cond", "weighting": "soft"},
    }  # fmt: skip
    table = [["kind", *ways]]
    for kind in bench.measures:
        rows = bench.rows(kind)
        own = bench.conditions(kind, rows)
        made = [bench.images([""] * len(rows), {kind: own}, **way) for way in ways.values()]
        table.append([kind, *(bench.score(kind, images, rows, own) for images in made)])
    return "Weightings on empty prompts (paper, 3.4)", table


PARTS: dict[str, Callable[[Bench], tuple[str, Table]]] = {
    "fidelity": fidelity, "prompts": prompts, "composition": composition, "weightings": weightings,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="where drawn scenes are kept")
    parser.add_argument("--parts", default=",".join([*PARTS, "trained"]))
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # scenes that are drawn, a reader that is trained
        bench = Bench(args.scenes, args.runs)
    print(f"{args.scenes} held-out scenes a kind, {STEPS} steps, guidance {bench.base.guidance:g}, "
          f"torch {torch.__version__}\n")  # fmt: skip
    for name in args.parts.split(","):
        if name == "trained":
            print(RECORD.read_text() if RECORD.is_file() else "no trained networks on record: make ablations")
            continue
        title, (head, *rows) = PARTS[name](bench)
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
        print(f"## {title}\n\n" + "\n".join(lines) + "\n", flush=True)


if __name__ == "__main__":
    main()
