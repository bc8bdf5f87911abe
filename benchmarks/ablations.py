"""What prompt dropout, the size of the data, zero convolutions and the copy do: `make ablations`, on `tiny`.

    python benchmarks/ablations.py [--steps 1000] [--scenes 100] [--runs runs/ablations]

Canny ControlNets from scratch, equal seed and steps (paper, 3.4, Fig. 10 and the ablation of section 4): the three of
`convergence.py`, one without prompt dropout, and from 100, 1,000 and 10,000 scenes instead of 3,000. A run that is
there is gone on with. Judged on held-out scenes of the world by the card's F1 of edges found again, with the scenes'
own prompts and with empty ones. Writes benchmarks/ablations.md, which `make paper` prints.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.tiny.card import interval, make_images
from controlnet.model.tiny.readers import JointReader, measures
from controlnet.model.tiny.world.shards import HELD_OUT, world, world_photos
from controlnet.model.training.report import read_run
from controlnet.preprocessors.files import write_file
from convergence import VARIANTS, run_of

RECORD = Path(__file__).with_name("ablations.md")
SIZES = {"hundred": 100, "thousand": 1000, "ten-thousand": 10_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes to judge on")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--convergence", type=Path, default=Path("runs/convergence"), help="where its runs are, or go")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        runs = {name: run_of(name, changes, args.convergence, args.steps) for name, changes in VARIANTS.items()}
        runs["no prompt emptied"] = run_of("undropped", ["prompt_dropout=0"], args.runs, args.steps)
        for name, count in SIZES.items():
            photos = world_photos(args.runs / "photos", count)
            runs[f"{count:,} scenes"] = run_of(name, [], args.runs, args.steps, str(photos))
        base = load_base("tiny")
        held_out = world(args.runs / "photos" / "held-out", args.scenes, base.native_size, HELD_OUT)
    canny = measures(JointReader())[0]
    rows = np.arange(args.scenes)
    conditions = [canny.condition(held_out, row) for row in range(args.scenes)]
    table = [
        "| network | loss, start to end | control gap | F1, own prompts | F1, empty prompts |",
        "|---|---|---|---|---|",
    ]
    for name, folder in runs.items():
        net = load_controlnet(folder, base.dtype)
        cells = []
        for prompts in (held_out.captions, [""] * args.scenes):
            images = make_images(base, net, prompts, conditions)
            mean, low, high = interval(np.array(canny.scores(images, held_out, rows, conditions)))
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        first, last = read_run(folder).validations[0], read_run(folder).validations[-1]
        table.append(f"| {name} | {first['validation_loss']:.4f} to {last['validation_loss']:.4f} | "
                     f"{last['control_gap']:.4f} | {' | '.join(cells)} |")  # fmt: skip
    text = f"""## Trained networks (paper, 3.3, 3.4 and 4)

Recorded by `make ablations`, torch {torch.__version__}: canny ControlNets on `tiny`, {args.steps:,} steps each, from
3,000 scenes where nothing else is said; {args.scenes} held-out scenes. Each is a plain
`controlnet train world --kind canny --set max_steps={args.steps}` with `convolutions=gaussian`, `copy=lite` or
`prompt_dropout=0` beside it, or a folder of so many scenes for `world`. Loss and gap are those of the run's own
held-out pairs: other pairs where the scenes are others, so that F1 alone compares the sizes.

{chr(10).join(table)}
"""
    write_file(RECORD, text.encode())
    print(text)


if __name__ == "__main__":
    main()
