"""When does control begin, and does it without the zero convolutions or the copy? `make convergence`.

Three canny ControlNets from scratch on `tiny`, same data, seed and number of steps (paper section 3.3 and the ablation
of section 4): as they are; `convolutions=gaussian`; `copy=lite`. Each is a plain `controlnet train world`; a run that
is there already is gone on with. Prints a table, draws the three curves of the control gap into one picture, and cuts a
strip of held-out pictures out of the first run's.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from controlnet.model.training.report import read_run

VARIANTS = {
    "zero convolutions, full copy": [],
    "Gaussian convolutions": ["convolutions=gaussian"],
    "lite": ["copy=lite"],
}


def run_of(name: str, changes: list[str], folder: Path, steps: int, data: str = "world") -> Path:
    """The run's folder, trained to its end."""
    run = folder / name.split()[0].lower()
    command = [sys.executable, "-m", "controlnet.cli.main", "train", data, "-o", str(run)]
    command += ["--kind", "canny", "--base", "tiny"]
    sets = [f"--set={text}" for text in (f"max_steps={steps}", *changes)]
    there = ["--resume"] if (run / "run.json").is_file() else []
    subprocess.run([*command, *sets, *there], check=True, stdout=subprocess.DEVNULL)
    return run


def draw(runs: dict[str, Path], path: Path) -> None:
    """The control gaps with their noise bands, over the optimiser steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, folder), colour in zip(runs.items(), ("tab:blue", "tab:orange", "tab:green"), strict=True):
        rows = read_run(folder).validations
        steps, gaps, bands = ([row[key] for row in rows] for key in ("step", "control_gap", "band"))
        low, high = ([gap + sign * band for gap, band in zip(gaps, bands, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, gaps, color=colour, marker=".", markersize=4, label=name)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("optimiser steps"), axes.set_ylabel("control gap")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def strip(run: Path, path: Path, at: tuple[float, ...] = (0, 0.1, 0.2, 0.4, 1)) -> None:
    """Two held-out pictures, their conditions, and what was made of them `at` parts of the run: cut of samples.png."""
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.images import png_bytes, read_image

    sheet, _ = read_image((run / "samples.png").read_bytes(), "samples.png")
    shown = [row["step"] for row in read_run(run).validations if row.get("pictures")]
    wide, edge = (sheet.shape[1] - 8) // (2 + len(shown)), 8
    nearest = {min(shown, key=lambda step, part=part: abs(step - part * shown[-1])) for part in at}
    columns = [0, 1, *(2 + shown.index(step) for step in sorted(nearest))]
    parts = [sheet[:, edge + wide * c : edge + wide * (c + 1)] for c in columns]
    write_file(path, png_bytes(np.concatenate([sheet[:, :edge], *parts], 1)[: len(sheet) * 2 // 3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence"))
    args = parser.parse_args()
    runs = {name: run_of(name, changes, args.runs, args.steps) for name, changes in VARIANTS.items()}
    print("| network | verdict | gap at a third | gap at the end | noise | validation loss, start to end |")
    print("|---|---|---|---|---|---|")
    for name, folder in runs.items():
        run = read_run(folder)
        rows = run.validations
        third = min(rows, key=lambda row: abs(row["step"] - args.steps / 3))
        print(f"| {name} | {run.verdict.text.split(':')[0]} | {third['control_gap']:.4f} | "
              f"{rows[-1]['control_gap']:.4f} | {rows[-1]['band']:.4f} | "
              f"{rows[0]['validation_loss']:.4f} to {rows[-1]['validation_loss']:.4f} |")  # fmt: skip
    draw(runs, args.runs / "gaps.png")
    strip(next(iter(runs.values())), args.runs / "strip.png")
    print(f"\nlook at {args.runs / 'gaps.png'} and {args.runs / 'strip.png'}")


if __name__ == "__main__":
    main()
