"""What `generate` is asked for: jobs, from flags, from a file of them, from folders of conditions. Loads no model."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from controlnet.cli.conditions import ConditionFlag, parse_condition, parse_weighting
from controlnet.cli.options import keeps, output_path, tell
from controlnet.model.modes import CONTROL_ON, MODES
from controlnet.preprocessors.errors import ControlNetError, InputError, OutputError, UsageError
from controlnet.preprocessors.metadata import KINDS

MAX_NUM = 10_000
MAX_STEPS = 999  # schedulers with an offset of one step have no more


@dataclass(frozen=True)
class Job:
    """One prompt with its conditions, for one or more images. Raises UsageError for what is wrong without a model."""

    cond: tuple[ConditionFlag, ...] = ()
    prompt: str = ""
    negative: str = ""
    out: str | None = None
    num: int = 1
    steps: int = 20
    guidance: float | None = None
    scheduler: str | None = None
    base: str = "tiny"
    size: tuple[int, int] | None = None
    seed: int | None = None
    mode: str | None = None
    control_on: str | None = None
    weighting: str | tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.cond and not self.prompt:
            raise UsageError(
                "nothing to go by: neither --cond nor --prompt",
                'controlnet generate --cond map.canny.png --prompt "..."',
            )
        if not 1 <= self.num <= MAX_NUM:
            raise UsageError(f"--num {self.num}: expected 1 to {MAX_NUM}", "--num 4")
        if not 1 <= self.steps <= MAX_STEPS:
            raise UsageError(f"--steps {self.steps}: expected 1 to {MAX_STEPS}", "--steps 20")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 1):
            raise UsageError(f"--guidance {self.guidance}: expected a number from 1 on", "--guidance 7.5")
        if self.seed is not None and not 0 <= self.seed < 2**63 - self.num:
            raise UsageError(f"--seed {self.seed}: expected 0 to {2**63 - 1}", "--seed 42")
        for flag, value, known in (("mode", self.mode, MODES), ("control-on", self.control_on, CONTROL_ON)):
            if value is not None and value not in known:
                near = difflib.get_close_matches(value, known, 1)
                raise UsageError(
                    f"--{flag} {value}: expected one of {', '.join(known)}", f"--{flag} {(near or list(known))[0]}"
                )

    @property
    def acts_on(self) -> str | None:
        """`both` halves of the guidance, or `cond`; None is the base's own way."""
        return self.control_on or (MODES[self.mode].control_on if self.mode else None)

    def weighting_of(self, flag: ConditionFlag) -> str | tuple[float, ...]:
        """The condition's own, else the job's, else the mode's, else uniform."""
        return flag.weighting or self.weighting or MODES[self.mode or "balanced"].weighting

    def seeded(self) -> Job:
        """With a random seed where it has none."""
        return self if self.seed is not None else replace(self, seed=random.randrange(2**31))

    @property
    def stem(self) -> str:
        """Of its images' names: the first condition's, without its kind, so that no image is taken for a map later."""
        return stem_of(self.cond[0].path) if self.cond else "image"


def stem_of(path: str) -> str:
    stem = Path(path).stem if path != "-" else "stdin"
    for kind in KINDS:
        stem = stem.removesuffix(f".{kind}").removesuffix(f"_{kind}")
    return stem or "image"


KEYS = tuple(f.name for f in fields(Job))
"""What a job in a file may say: the flags of `generate`, with _ or - between words."""
_READERS = {"num": int, "steps": int, "seed": int, "guidance": float}


def make_job(given: dict[str, Any], defaults: dict[str, Any]) -> Job:
    """A job of what is given under the names of KEYS, as text or JSON values, on top of `defaults`. Raises UsageError
    for unknown names, naming the nearest, and for values that are none."""
    from controlnet.preprocessors.geometry import parse_size

    values = dict(defaults)
    for name, value in given.items():
        key = name.replace("-", "_")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise UsageError(f"unknown key {name!r}, expected one of {', '.join(KEYS)}", (near or KEYS)[0])
        if value is None or (value == "" and key not in ("prompt", "negative")):
            continue
        values[key] = value
    for key, reader in _READERS.items():
        if values.get(key) is not None:
            values[key] = _number(key, values[key], reader)
    for key, value in values.items():
        if key not in (*_READERS, "cond", "size", "weighting") and value is not None and not isinstance(value, str):
            raise UsageError(f"{key}: {value!r}, expected text", f'"{key}": "..."')
    conditions = values.get("cond") or []
    conditions = [conditions] if isinstance(conditions, str) else conditions
    if not isinstance(conditions, (list, tuple)) or not all(isinstance(c, str) for c in conditions):
        raise UsageError(f"cond: {conditions!r}, expected text or a list of texts", '"cond": ["map.png,scale=0.8"]')
    values["cond"] = tuple(parse_condition(text) for text in conditions)
    if values.get("size") is not None:
        values["size"] = parse_size(str(values["size"]))
    if values.get("weighting") is not None:
        values["weighting"] = parse_weighting("--weighting", str(values["weighting"]))
    return Job(**values)


def _number(key: str, value: Any, reader: type) -> int | float:
    try:
        if isinstance(value, bool) or (reader is int and float(value) != int(value)):
            raise ValueError
        return reader(value)
    except (ValueError, TypeError, OverflowError):
        kind = "a whole number" if reader is int else "a number"
        raise UsageError(f"{key}: {value!r}, expected {kind}", f"{key}=1") from None


def read_jobs_file(path: Path) -> list[tuple[str, dict[str, Any] | UsageError]]:
    """`read_jobs` of a file."""
    from controlnet.preprocessors.images import read_bytes

    empty = path.is_file() and path.stat().st_size == 0
    return list(read_jobs(str(path), b"" if empty else read_bytes(str(path))))


def read_jobs(path: str, data: bytes) -> Iterator[tuple[str, dict[str, Any] | UsageError]]:
    """(where, what is given) for every job of a file: JSON Lines, or CSV with the keys in its first line, several
    conditions of a job between |. A line that is no job gives its error. Raises InputError for a file without jobs."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})", f"iconv -t UTF-8 {path}") from error
    if not text.strip():
        raise InputError(f"{path}: no jobs in it", '{"cond": "map.canny.png", "prompt": "..."}   (one a line)')
    if path.lower().endswith(".csv"):
        rows = csv.DictReader(io.StringIO(text), restkey="")
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if "" in row or None in row.values():
                many = "more" if "" in row else "fewer"
                yield where, UsageError(f"{many} values than keys in the first line", ",".join(rows.fieldnames or []))
                continue
            given: dict[str, Any] = {k.strip(): v for k, v in row.items()}
            if given.get("cond"):
                given["cond"] = [part.strip() for part in given["cond"].split("|")]
            yield where, given
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                given = json.loads(line)
                yield (
                    f"{path} line {number}",
                    given
                    if isinstance(given, dict)
                    else UsageError(
                        f"{line.strip()[:60]}: expected a JSON object", '{"cond": "map.canny.png", "prompt": "..."}'
                    ),
                )
            except json.JSONDecodeError as error:
                yield f"{path} line {number}", UsageError(f"not JSON ({error})")


def spread(job: Job) -> list[Job]:
    """A folder as a condition stands for all pictures in it: a job each. Several folders are paired by name, without
    the kind. Raises InputError for a folder without pictures or one without the partner of another's."""
    from controlnet.preprocessors.images import SUFFIXES

    folders = [(k, flag) for k, flag in enumerate(job.cond) if flag.path != "-" and Path(flag.path).is_dir()]
    if not folders:
        return [job]
    found: list[dict[str, str]] = []
    for _, flag in folders:
        paths = sorted(p for p in Path(flag.path).iterdir() if p.suffix.lower() in SUFFIXES)
        stems = {stem_of(str(p)): str(p) for p in paths}
        if not stems:
            raise InputError(
                f"{flag.path}: the folder holds no pictures", f"controlnet detect canny PHOTOS -o {flag.path}"
            )
        if len(stems) < len(paths):
            raise InputError(f"{flag.path}: holds several maps of one photo", "a folder for each kind")
        found.append(stems)
        if lacking := sorted(found[0].keys() ^ stems.keys()):
            raise InputError(
                f"{folders[0][1].path} and {flag.path}: {lacking[0]} is in one and not in the other",
                "give both folders maps of the same names",
            )
    jobs = []
    for stem in found[0]:
        flags = list(job.cond)
        for (k, flag), stems in zip(folders, found, strict=True):
            flags[k] = replace(flag, path=stems[stem])
        jobs.append(replace(job, cond=tuple(flags)))
    return jobs


@dataclass(frozen=True)
class Wanted:
    """An image to be made: where it goes (None: standard output), and what of."""

    name: str
    job: Job
    seed: int
    path: Path | None


def targets(jobs: list[tuple[str, Job]], overwrite: bool, skip_existing: bool, as_json: bool,
            failed: Callable[[str, ControlNetError], None]) -> list[Wanted]:  # fmt: skip
    """The images to be made, after what is there has been told of. An output that is in the way fails its job."""
    wanted: list[Wanted] = []
    taken: dict[Path | None, str] = {}
    several = sum(job.num for _, job in jobs) > 1
    for name, job in jobs:
        try:
            seeded = job.seeded()
            assert seeded.seed is not None
            images = []
            for seed in range(seeded.seed, seeded.seed + job.num):
                default = Path("out") / f"{seed}-{job.stem}.png"
                alone = job.num == 1 and (not several or (job.out or "").endswith(".png"))
                path = output_path(job.out, default, not alone)
                if job.seed is None and skip_existing and path is not None and path.name == default.name:
                    raise UsageError("without a seed its images have new names each time", "--seed 1")
                if path in taken:
                    raise OutputError(f"{path}: {taken[path]} is written there too", "a seed or an out of its own")
                if path is not None and keeps(path, overwrite, skip_existing):
                    tell({"output": str(path), "seed": seed, "skipped": True}, as_json)
                else:
                    images.append(Wanted(name, seeded, seed, path))
                if path is not None:
                    taken[path] = name
            wanted += images
        except ControlNetError as error:
            failed(name, error)
    return wanted
