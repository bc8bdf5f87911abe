"""The checkpoints of a run: one state each, whole or not there; the last ones and the best one are kept.

A state is a file, `step-0000100.pt`. If several processes shard it, it is a folder of that name in the form of
torch.distributed.checkpoint, to which each of them writes its part. Either is read by any number of processes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from controlnet.model.work.machine import is_out_of_memory
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.files import beside, scratch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

if TYPE_CHECKING:
    from controlnet.model.training.state import State

TENSORS = ("parameters", "ema")
REST = "rest.pt"
"""In a folder, what is not sharded: settings of the optimiser, progress."""


def save_atomic(obj: object, path: Path) -> None:
    """torch.save under a temporary name, then rename: the file is whole or not there, even on a full disk."""
    with beside(path) as temporary:
        _save(obj, temporary, path)


def _save(obj: object, to: Path, path: Path) -> None:
    with open(to, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {error}", str(path)) from error
        file.flush()
        os.fsync(file.fileno())


class Checkpoints:
    """`step-0000100.pt` files or folders in a folder. `keep` is how many of the last ones stay."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        found = [re.fullmatch(r"step-(\d+)\.pt", path.name) for path in self.folder.glob("step-*.pt")]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}.pt"

    def save(self, state: State, step: int, best: int | None = None) -> None:
        """Write the state of `step`, then remove the ones that are neither among the last nor `best`. Several processes
        call it together."""
        if state.parallel.is_sharded:
            self._save_sharded(state, step)
        else:
            saved = state.saved()  # from all processes, with ZeRO
            if state.parallel.is_main:
                save_atomic(saved, self.path(step))
        if not state.parallel.is_main:
            return
        for old in self.steps()[: -self.keep]:
            if old != best:
                _remove(self.path(old))

    def _save_sharded(self, state: State, step: int) -> None:
        from torch.distributed import checkpoint

        saved, parallel = state.saved(), state.parallel
        temporary = Path(parallel.once(lambda: str(scratch(self.folder))))
        try:
            with _quiet():
                checkpoint.save(_tensors(saved), checkpoint_id=temporary)
        except CheckpointException as error:  # in all processes; it is no Exception
            if parallel.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise _why(error, self.path(step)) from error
        if parallel.is_main:
            _save(_rest(saved), temporary / REST, self.path(step))
            _remove(self.path(step))
            temporary.rename(self.path(step))
        parallel.wait()

    def load(self, state: State | None = None) -> dict[str, Any] | None:
        """The last undamaged state, on the device of `state`, and sharded as `state` is; None when there is none. A
        damaged one gets the ending `.damaged`. Raises ModelError where all are damaged, and OSError or MemoryError for
        what is the machine's fault, not the file's. Several processes call it together."""
        damaged = False
        once: Callable[[Callable[[], Any]], Any] = state.parallel.once if state else lambda make: make()
        for step in reversed(once(self.steps)):
            saved, good = None, True
            try:
                saved = self._read(step, state)
            except (Exception, CheckpointException) as error:  # damaged bytes fail in a dozen ways
                if _is_the_machines(error):
                    raise
                good = False
            if state:
                good = not state.parallel.any(not good)
            if good:
                return _to(saved, state.device) if state else saved
            damaged = True
            path = self.path(step)
            once(partial(path.rename, path.with_suffix(".damaged")))
        if damaged:
            raise ModelError(
                f"{self.folder}: no checkpoint in it can be read", "start anew, from its network: --set start_from=RUN"
            )
        return None

    def _read(self, step: int, state: State | None) -> dict[str, Any]:
        """A state; what is not sharded is on the CPU, whatever device it was saved from."""
        path = self.path(step)
        if not path.is_dir():
            return torch.load(path, map_location="cpu", weights_only=True)
        from torch.distributed import checkpoint

        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        if state is None or state.parallel.zero:
            tensors = _read_whole(path)
        else:
            tensors = _tensors(state.with_moments())
            with _quiet():
                checkpoint.load(tensors, checkpoint_id=path, no_dist=state.parallel.count == 1)
        moments = {int(number): values for number, values in tensors.pop("moments").items()}
        lists = {key: [tensors[key][str(i)] for i in range(len(tensors[key]))] for key in TENSORS}
        return rest | lists | {"optimizer": rest["optimizer"] | {"state": moments}}


def _is_the_machines(error: BaseException) -> bool:
    """Whether reading failed for want of memory or by the system, and not because of what the file holds."""
    if isinstance(error, CheckpointException):
        return any(_is_the_machines(one) for one, _ in error.failures.values())
    if isinstance(error, FileNotFoundError):  # a part of a folder
        return False
    if isinstance(error, OSError) and error.errno is not None:  # torch raises some of its own without
        return True
    return is_out_of_memory(error)


def _why(error: CheckpointException, path: Path) -> OSError:
    """What went wrong in one of the processes: a full disk, or what the system says else."""
    told = next((one for one, _ in error.failures.values() if isinstance(one, OSError) and one.errno), None)
    number = told.errno if told is not None and told.errno else errno.ENOSPC  # torch's writer tells no number
    return OSError(number, os.strerror(number), str(path))


def _tensors(saved: dict[str, Any]) -> dict[str, Any]:
    """The part of a state that is sharded: names in nested dictionaries, and tensors."""
    named = {key: {str(i): value.detach() for i, value in enumerate(saved[key])} for key in TENSORS}
    return named | {"moments": {str(k): v for k, v in saved["optimizer"]["state"].items()}}


def _rest(saved: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in TENSORS} | {
        "optimizer": {"param_groups": saved["optimizer"]["param_groups"]}
    }


def _read_whole(path: Path) -> dict[str, Any]:
    """The tensors of a sharded state, on the CPU, in one process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder, "whole.pt")
        dcp_to_torch_save(path, file)
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of what we mean: that a single process reads or writes a sharded state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to(state: Any, device: torch.device | str) -> Any:
    """The state with its tensors on a device."""
    if isinstance(state, dict):
        return {key: _to(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_to(value, device) for value in state)
    return state.to(device) if isinstance(state, Tensor) else state
