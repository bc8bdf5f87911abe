"""A fixed part of many jobs (`--shard 2/8`): shards need not talk to each other, and together they do what one command
would do. Loads no library.

What belongs to which shard follows from its content alone, by a hash. A file in the results' folder names the settings,
so that shards of two different commands are not mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from controlnet.preprocessors.errors import OutputError, UsageError
from controlnet.preprocessors.files import write_new
from controlnet.preprocessors.jsons import object_or_empty

MANIFEST = ".controlnet-shards.json"
LAUNCHERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
    ("RANK", "WORLD_SIZE", "", ""),
    ("SLURM_PROCID", "SLURM_NTASKS", "", ""),
)
"""Variables that launchers set: of the task, the number of tasks, the first task, the step between two."""
HINT = "--shard 1/4, ... --shard 4/4"


@dataclass(frozen=True)
class Shard:
    """Number `number`, from 1, of `count`."""

    number: int
    count: int

    @property
    def name(self) -> str:
        return f"shard {self.number}/{self.count}"

    def holds(self, content: str) -> bool:
        """Whether something with this content, a text that tells it from all others, is in the shard."""
        digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
        return int(digest, 16) % self.count == self.number - 1


WHOLE = Shard(1, 1)


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """`I/N`, or `auto` for what a launcher says in the environment; None is the whole. Raises UsageError."""
    if text is None:
        return WHOLE
    if text == "auto":
        return _launched(environment)
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard {text}: expected I/N with I from 1 to N", f"{HINT}; or --shard auto")
    return Shard(int(number), int(count))


def _launched(environment: Mapping[str, str]) -> Shard:
    for task, count, first, step in LAUNCHERS:
        if task in environment and count in environment:
            try:
                number = (int(environment[task]) - int(environment.get(first, 0))) // int(environment.get(step, 1))
                return parse_shard(f"{number + 1}/{int(environment[count])}")
            except (ValueError, ZeroDivisionError):
                said = f"{task}={environment[task]}, {count}={environment[count]}"
                raise UsageError(f"--shard auto: {said}", HINT) from None
    names = ", ".join(task for task, *_ in LAUNCHERS)
    raise UsageError(f"--shard auto: none of {names} is set", HINT)


def claim(folder: Path, shard: Shard, settings: object) -> None:
    """Say in the results' folder what this shard is a part of. Raises OutputError if shards of another command, or
    of another number, have begun there."""
    if shard == WHOLE:
        return
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    own = {"shards": shard.count, "settings_sha256": digest}
    path = folder / MANIFEST
    if write_new(path, (json.dumps(own) + "\n").encode()):
        return
    there = object_or_empty(path.read_bytes())
    if there != own:
        what = f"{there.get('shards')} shards" if there.get("shards") != shard.count else "other settings or jobs"
        raise OutputError(
            f"{folder}: holds results of {what}, and this is one of {shard.count}", f"another -o, or rm {path}"
        )
