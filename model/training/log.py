"""The log of a run: JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from controlnet.preprocessors.files import beside


class Log:
    """A file of JSON lines, one object per line."""

    def __init__(self, path: Path, write: bool = True):
        self.path, self.writes = path, write
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, fields: dict[str, Any]) -> None:
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(fields) + "\n")

    def trim(self, step: int) -> None:
        """Drop what was logged after `step`, and a last line that a crash cut off."""
        if self.writes and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(True) if _step_of(line) <= step]
            with beside(self.path) as temporary:
                temporary.write_text("".join(lines))


def has_stopped(folder: Path) -> bool:
    """Whether the training in a folder was stopped by a signal and not at its end, as its log's last line says."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return bool(lines) and json.loads(lines[-1]).get("ended") == "stopped"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf
