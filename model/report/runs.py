"""Training runs as a page: curves, verdicts, settings, and what the networks made of held-out pairs over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.model.report.page import as_data
from controlnet.model.training.report import RunState, describe, read_run
from controlnet.model.training.runfolder import RunFolder
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.images import read_bytes, read_image

POINTS = 1000
"""Of a curve."""
SHOTS = 60
"""Steps whose pictures are shown, of one run."""
SIDE = 384


def runs_page(folders: list[Path]) -> dict[str, Any]:
    """What the page shows of these runs. Raises InputError for a folder that is none."""
    runs = [read_run(folder) for folder in folders]
    every = [_settings(run) for run in runs]
    names = list(dict.fromkeys(name for settings in every for name in settings))
    rows = [[name, *(settings.get(name, "-") for settings in every)] for name in names]
    return {
        "runs": [_run(run) for run in runs],
        "settings": [{"values": row, "differs": len(set(row[1:])) > 1} for row in rows],
    }


def _run(run: RunState) -> dict[str, Any]:
    settings = run.record["settings"]
    left = run.seconds_left if run.state == "running" else None
    return {
        "name": run.folder.name or str(run.folder.resolve().name),
        "state": run.state,
        "word": run.verdict.word,
        "lines": describe(run),
        "began": run.verdict.step,
        "step": run.step,
        "of": settings["max_steps"],
        "seconds_left": left,
        "kind": settings.get("kind"),
        "base": settings.get("base"),
        "loss": thinned(known([row["step"], row["loss"]] for row in run.steps)),
        "validations": known(
            [row["step"], row["control_gap"], row["band"], row["validation_loss"]] for row in run.validations
        ),
        **_pictures(run),
    }


def known(points: Iterable[list[float]]) -> list[list[float]]:
    """The points whose numbers are numbers: an exploded run has others."""
    return [point for point in points if all(map(math.isfinite, point))]


def thinned(points: list[list[float]]) -> list[list[float]]:
    """At most POINTS of a curve, each the mean of its neighbours."""
    if len(points) <= POINTS:
        return points
    groups = np.array_split(np.array(points, float), POINTS)
    return [[float(v) for v in group.mean(0).round(6)] for group in groups]


def _pictures(run: RunState) -> dict[str, Any]:
    """The held-out pictures and conditions, and what was made of each at the steps that have pictures."""
    folder = RunFolder(run.folder)
    shots = []
    for path in sorted((run.folder / "pictures").glob("step-*.png")):
        step = re.fullmatch(r"step-(\d+)", path.stem)
        if step and (strip := _read(path)) is not None:
            shots.append((int(step[1]), strip))
    if len(shots) > SHOTS:  # the first, the last, and evenly between
        shots = [shots[round(k * (len(shots) - 1) / (SHOTS - 1))] for k in range(SHOTS)]
    held = _read(folder.held_out)
    rows = [] if held is None or len(held) % 2 else [_cut(row) for row in np.split(held, 2)]
    return {
        "shots": [{"step": step, "pictures": cut} for step, strip in shots if (cut := _cut(strip))],
        "held_out": [{"picture": picture, "condition": condition} for picture, condition in zip(*rows, strict=True)]
        if rows else [],
    }  # fmt: skip


def _cut(strip: np.ndarray) -> list[str]:
    """Squares side by side, each as data; none of a picture that is not made of squares."""
    if strip.shape[1] % strip.shape[0]:
        return []
    return [as_data(square, SIDE) for square in np.split(strip, strip.shape[1] // strip.shape[0], 1)]


def _read(path: Path) -> np.ndarray | None:
    """None for a picture that is not there, or that a run is writing."""
    try:
        return read_image(read_bytes(str(path)), str(path))[0]
    except ControlNetError:
        return None


def _settings(run: RunState) -> dict[str, str]:
    data = run.record["data"]
    facts = {f"data: {name}": data[name] for name in ("name", "form", "pairs", "held_out") if name in data}
    return {name: str(value) for name, value in (run.record["settings"] | facts).items() if value is not None}
