"""Turns what can go wrong in training into errors that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from controlnet.model.registry import BASES
from controlnet.model.training.config import TrainConfig
from controlnet.model.training.loop import ExplodedError
from controlnet.model.training.runfolder import RunFolder
from controlnet.model.work.machine import is_out_of_memory
from controlnet.preprocessors.errors import OutputError, TrainingError

GONE = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "NCCL", "Socket Timeout")
"""What the libraries say when a process no longer answers."""


@contextmanager
def explained(config: TrainConfig, run: RunFolder) -> Iterator[None]:
    """Turn what goes wrong inside the block into errors that say what to do."""
    try:
        yield
    except ExplodedError as error:
        kept = f"; the checkpoints before are kept in {run.path}" if run.has_checkpoints else ""
        known = BASES.get(config.base)
        usual = known.training.get("learning_rate", TrainConfig.learning_rate) if known else TrainConfig.learning_rate
        lower = min(config.learning_rate / 3, max(usual, config.learning_rate / 100))
        raise TrainingError(
            f"{error}{kept}", f"a lower rate from the start: --set learning_rate={lower:.1g}; {usual:g} is usual"
        ) from error
    # Memory: the remedy that halves it and changes nothing comes first.
    except (RuntimeError, MemoryError) as error:
        if any(word in str(error) for word in GONE):
            goes_on = f"--resume -o {run.path} goes on from the last checkpoint" if run.has_checkpoints else ""
            raise TrainingError("another process of this run is gone, or cannot be reached", goes_on) from error
        if not is_out_of_memory(error):
            raise
        ways = ["--set gradient_checkpointing=true", "--set precision=bfloat16", "--set size=... (smaller pictures)"]
        if config.batch_size > 1:
            halved = f"--set batch_size={config.batch_size // 2} --set accumulation={2 * config.accumulation}"
            ways.insert(0, f"{halved} halves what grows with the batch and leaves the step as it is")
        raise TrainingError(
            f"out of memory with batch_size={config.batch_size} in {config.precision}", "; or ".join(ways)
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        whole = "; the last checkpoint is whole" if run.has_checkpoints else ""
        raise OutputError(
            f"{error.filename or run.path}: cannot be read or written ({error.strerror}){whole}",
            "free some disk, then the same command with --resume",
        ) from error
