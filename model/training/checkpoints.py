"""The checkpoints of a run: one file per state, whole or not there; the last ones and the best one are kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.files import beside


def save_atomic(obj: object, path: Path) -> None:
    """torch.save under a temporary name, then rename: the file is whole or not there, even on a full disk."""
    with beside(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {error}", str(path)) from error
        file.flush()
        os.fsync(file.fileno())


class Checkpoints:
    """`step-0000100.pt` files in a folder. `keep` is how many of the last ones stay."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.pt"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}.pt"

    def save(self, state: dict[str, Any], step: int, best: int | None = None) -> None:
        """Write the state of `step`, then remove the ones that are neither among the last nor `best`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_atomic(state, self.path(step))
        for old in self.steps()[: -self.keep]:
            if old != best:
                self.path(old).unlink()

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The last undamaged state; None when there is none. A damaged file gets the ending `.damaged`. Raises
        ModelError where all are damaged."""
        damaged = False
        for step in reversed(self.steps()):
            try:
                state = torch.load(self.path(step), weights_only=True)
            except Exception:  # damaged bytes fail in a dozen ways
                damaged = True
                self.path(step).rename(self.path(step).with_suffix(".damaged"))
                continue
            return _to(state, device)
        if damaged:
            raise ModelError(
                f"{self.folder}: no checkpoint in it can be read", "start anew, from its network: --set start_from=RUN"
            )
        return None


def _to(state: Any, device: torch.device | str) -> Any:
    """The state with its tensors on a device."""
    if isinstance(state, dict):
        return {key: _to(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_to(value, device) for value in state)
    return state.to(device) if isinstance(state, torch.Tensor) else state
