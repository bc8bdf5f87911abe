"""The folder of a training run: what lies where in it, which name is next, and who may write.

RUN/config.json, diffusion_pytorch_model.safetensors   the best network so far, in diffusers' layout
RUN/run.json, config.toml, log.jsonl                   what is trained and how it goes
RUN/curve.png, samples.png, README.md                  to look at
RUN/checkpoints/, pictures/, tensorboard/              to go on from; each look at the held-out pairs
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.model.work.processes import PARENT
from controlnet.preprocessors.files import is_file, write_file
from controlnet.preprocessors.lock import locked


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, by what they are."""

    path: Path

    @property
    def record(self) -> Path:
        """What is trained, on what data, with which settings: JSON."""
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        """The settings as TOML, which `--config` reads again."""
        return self.path / "config.toml"

    @property
    def log(self) -> Path:
        """Losses, validations and how it ended: JSON lines."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def pictures(self, step: int) -> Path:
        """What the network made of held-out conditions at a step."""
        return self.path / "pictures" / f"step-{step:07d}.png"

    @property
    def held_out(self) -> Path:
        """The held-out pairs that pictures are made of: pictures above, conditions below."""
        return self.path / "pictures" / "held-out.png"

    @property
    def holds_run(self) -> bool:
        return is_file(self.record)

    @property
    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("*.pt"))

    def begin(self, record: dict[str, Any], config: str) -> None:
        write_file(self.config, config.encode())
        write_file(self.record, (json.dumps(record, indent=2) + "\n").encode())

    @contextmanager
    def forgotten(self, new: bool) -> Iterator[None]:
        """If a `new` run fails inside, its record and settings are removed, so that the same command can be given
        again."""
        try:
            yield
        except BaseException:
            if new:
                for file in (self.record, self.config):
                    file.unlink(missing_ok=True)
            raise


def next_run(data: Path, resume: bool) -> Path:
    """runs/DATA-N: the next free N, or with `resume` the last one that exists."""
    name = re.sub(r"[^\w.-]+", "-", data.resolve().name if data.is_dir() else data.name) or "data"
    last = 0
    for path in Path("runs").glob(f"{name}-*"):
        if match := re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name):
            last = max(last, int(match[1]))
    return Path("runs") / f"{name}-{max(1, last if resume else last + 1)}"


@contextmanager
def claimed(folder: Path, numbered: bool) -> Iterator[tuple[Path, int]]:
    """The folder of a run, and the handle of its lock: while inside, it belongs to this command alone. A new folder
    that stays empty is removed again. If another command was quicker to take a `numbered` folder, the next number is
    taken."""
    if PARENT in os.environ or os.environ.get("RANK", "0") != "0":  # another process holds it for us
        yield folder, -1
        return
    folder, new = _made(folder, numbered)
    try:
        with locked(folder) as lock:
            yield folder, lock
    finally:
        if new:
            for empty in (folder, folder.parent):
                with suppress(OSError):
                    empty.rmdir()


def _made(folder: Path, numbered: bool) -> tuple[Path, bool]:
    """The folder, made if it was not there, and whether it was made here."""
    if not numbered:
        new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        return folder, new
    while True:
        try:
            folder.mkdir(parents=True)
            return folder, True
        except FileExistsError:
            stem, _, number = folder.name.rpartition("-")
            folder = folder.with_name(f"{stem}-{int(number) + 1}")
