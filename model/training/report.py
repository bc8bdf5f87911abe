"""A run as people see it: its log, its curve, its state in words. Needs no torch."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.model.training.runfolder import RunFolder
from controlnet.model.training.verdict import Verdict, verdict
from controlnet.preprocessors.errors import InputError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import read_object
from controlnet.preprocessors.lock import is_locked

SETTINGS: dict[str, Any] = {
    "max_steps": int,
    "kind": str,
    "base": str,
    "learning_rate": (int, float),
    "accumulation": int,
}
"""Settings that a run's state is told with, and their types."""


@dataclass(frozen=True)
class RunState:
    """What is in the files of a run. `steps` are the log's training lines, `validations` its lines on held-out pairs.
    `state` is preparing, running, finished, exploded or stopped; a stopped run can be resumed."""

    folder: Path
    record: dict[str, Any]
    steps: list[dict]
    validations: list[dict]
    verdict: Verdict
    state: str
    step: int

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the pace of the last ten log lines; None if there are too few."""
        recent = self.steps[-10:]
        if len(recent) < 2 or recent[-1]["step"] == recent[0]["step"]:
            return None
        pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
        return pace * (self.record["settings"]["max_steps"] - self.step)


def read_run(folder: Path, at_work: bool | None = None) -> RunState:
    """The state of the run in a folder. `at_work` says whether a process is training in it; by default the folder's
    lock shows that. Raises InputError for a folder that is not a run."""
    run = RunFolder(Path(folder))
    if not run.holds_run:
        raise InputError(f"{folder}: is not a training run (no run.json)", "controlnet status runs/DATA-1")
    record = read_object(run.record.read_bytes(), str(run.record), hint="start the run anew")
    wrong = [key for key in ("settings", "facts", "data") if not isinstance(record.get(key), dict)]
    if not wrong:
        wrong = [name for name, types in SETTINGS.items() if not isinstance(record["settings"].get(name), types)]
    if wrong:
        raise InputError(f"{run.record}: has no {wrong[0]}", "start the run anew")
    rows = []
    if run.log.is_file():
        for line in run.log.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if has_numbers(row, "step"):
                rows.append(row)
    validations = [row for row in rows if has_numbers(row, "control_gap", "band", "validation_loss")]
    steps = [row for row in rows if has_numbers(row, "lr", "loss", "seconds")]
    ended = rows[-1].get("ended") if rows else None
    running = is_locked(folder) if at_work is None else at_work
    state = ("running" if rows else "preparing") if running else ended or "stopped"
    judged = verdict(validations, record["settings"], record["facts"], ended == "finished" and state != "running")
    step = max((row["step"] for row in rows), default=0)
    return RunState(run.path, record, steps, validations, judged, state, step)


def has_numbers(row: Any, *names: str) -> bool:
    """Whether a line of a log is an object in which these are numbers."""
    return isinstance(row, dict) and all(isinstance(row.get(name), (int, float)) for name in names)


def duration(seconds: float) -> str:
    """`2 h 05 min`, `12 min`, `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def describe(run: RunState) -> list[str]:
    """The run in a few lines: the verdict; the step and the time left, or how it ended; gap and loss; possible
    causes."""
    settings = run.record["settings"]
    if run.state == "preparing":
        return [f"preparing: latents, texts and conditions of {_amount(run.record['data'])}, once for all runs"]
    lines = [run.verdict.text, f"step {run.step:,} of {settings['max_steps']:,}"]
    if run.state == "exploded":
        lines[0] = f"exploded at step {run.step:,}; before that: {run.verdict.text}"
    if run.state != "running":
        lines[-1] += f", {run.state}"
    elif run.step < settings["max_steps"] and run.seconds_left is not None:
        lines[-1] += f", {duration(run.seconds_left)} left"
    if run.validations:
        last = run.validations[-1]
        lines.append(
            f"control gap {last['control_gap']:z.4f} (noise {last['band']:.4f}), "
            f"validation loss {last['validation_loss']:.4f} at step {last['step']:,}"
        )
    return lines + [f"possible cause: {cause}" for cause in run.verdict.causes]


def _amount(data: dict[str, Any]) -> str:
    return "a stream of pairs" if data["pairs"] is None else f"{data['pairs']:,} pairs"


def draw_curve(run: RunState, path: Path) -> None:
    """The control gap with its noise band above, the losses below, as a PNG."""
    if not run.validations:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    # Above: the gap, which must leave the band.
    steps, gaps, bands = ([row[key] for row in run.validations] for key in ("step", "control_gap", "band"))
    above.fill_between(steps, [-b for b in bands], bands, color="0.88", label="noise band")
    above.plot(steps, gaps, color="tab:blue", marker=".", label="control gap")
    above.axhline(0, color="0.6", linewidth=0.8)
    if run.verdict.step is not None:
        above.axvline(run.verdict.step, color="tab:green", linestyle="--", label=run.verdict.text.split(":")[0])
    above.set_ylabel("loss with another condition\nminus loss with the true one")
    settings = run.record["settings"]
    above.set_title(f"{settings['kind']} on {settings['base']}, step {run.step:,}: {run.verdict.word}", fontsize=10)
    above.legend(loc="upper left", frameon=False)

    # Below: the losses, which hardly show it.
    below.plot(
        [r["step"] for r in run.steps], [r["loss"] for r in run.steps], color="0.7", linewidth=1, label="training"
    )
    below.plot(steps, [r["validation_loss"] for r in run.validations], color="tab:red", label="validation")
    below.set_ylabel("loss"), below.set_xlabel("optimiser steps")
    below.legend(loc="upper right", frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())


def draw_curves(runs: list[RunState], path: Path) -> None:
    """The control gaps of several runs in one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for run in runs:
        steps, gaps = ([row[key] for row in run.validations] for key in ("step", "control_gap"))
        axes.plot(steps, gaps, marker=".", label=f"{run.folder.name}: {run.verdict.word}")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("optimiser steps"), axes.set_ylabel("control gap")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())


def model_card(run: RunState, best_step: int) -> str:
    """README.md of the run's folder."""
    settings, data = run.record["settings"], run.record["data"]
    best = next((row for row in run.validations if row["step"] == best_step), None)
    measured = (
        f"Validation loss {best['validation_loss']:.4f}, control gap {best['control_gap']:z.4f} (noise band "
        f"{best['band']:.4f}) on {data['held_out']} held-out pairs."
        if best
        else ""
    )
    loads = settings["hint"] == "released" and settings["copy"] == "full"
    use = f"""
    from diffusers import ControlNetModel
    controlnet = ControlNetModel.from_pretrained("{run.folder.name}")
"""
    if not loads:
        what = "hint encoder" if settings["copy"] == "full" else "lite form"
        use = f"\ndiffusers cannot load it: its {what} is this project's own.\n"
    return f"""---
tags: [controlnet, {settings["kind"]}]
base_model: {settings["base"]}
---
# A ControlNet for {settings["kind"]}

Trained with the ControlNet toolkit on base `{settings["base"]}` (sha256 {run.record["base_sha256"][:16]}), at
{run.record["size"]} pixels. Network of step {best_step:,}; {run.verdict.text}. {measured}

    controlnet generate --base {settings["base"]} --cond map.png,net={run.folder.name}/ --prompt "..."
{use}
Data: {_amount(data)} from `{data["name"]}` ({data["form"]}), {data["held_out"]} of them held out. Settings are
in `config.toml`, the curve in `curve.png`, pictures over the run in `samples.png`.
"""
