"""What `generate` is asked for: jobs, from flags, from a file of them, from folders of conditions. Loads no model."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from controlnet.cli.conditions import ConditionFlag, parse_condition, parse_weighting
from controlnet.cli.options import is_folder, keeps, output_path, tell
from controlnet.model.control.modes import CONTROL_ON, MODES
from controlnet.preprocessors.errors import ControlNetError, InputError, ModelError, OutputError, UsageError
from controlnet.preprocessors.files import decoded, exists, is_dir, is_file
from controlnet.preprocessors.jsons import read_object
from controlnet.preprocessors.metadata import KINDS, kind_of, text_of

MAX_NUM = 10_000
EXAMPLE = '{"cond": "map.canny.png", "prompt": "..."}'
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

        for flag, text in (("prompt", self.prompt), ("negative", self.negative)):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UsageError(f"--{flag} {text!r}: not UTF-8", "locale tells the terminal's own coding") from None

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
    folder = defaults.get("out")
    for name, value in given.items():
        key = name.replace("-", "_")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise UsageError(f"unknown key {name!r}, expected one of {', '.join(KEYS)}", (near or KEYS)[0])
        if value is None or (value == "" and key not in ("prompt", "negative")):
            continue
        values[key] = value
    place = values.get("out")
    if folder and folder != "-" and place != folder and isinstance(place, str) and is_folder(folder):
        # Places in a file of jobs are below -o.
        values["out"] = str(Path(folder) / place) + "/" * place.endswith("/")
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

    empty = is_file(path) and path.stat().st_size == 0
    return list(read_jobs(str(path), b"" if empty else read_bytes(str(path))))


def read_jobs(path: str, data: bytes) -> Iterator[tuple[str, dict[str, Any] | UsageError]]:
    """(where, what is given) for every job of a file: JSON Lines, or CSV with the keys in its first line, several
    conditions of a job between |. A line that is no job gives its error. Raises InputError for a file without jobs."""
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        decoded(data, path)  # raises: every line of it is unreadable
    if not data.strip():
        raise InputError(f"{path}: no jobs in it", f"{EXAMPLE}   (one per line)")
    # Bytes that are not UTF-8 spoil their own line alone.
    text = data.decode("utf-8", errors="surrogateescape")
    if path.lower().endswith(".csv"):
        rows = csv.DictReader(io.StringIO(text, newline=""), restkey="")
        while True:
            try:
                row = next(rows)
                _check_text(" ".join(str(value) for value in row.values()))
            except StopIteration:
                return
            except (csv.Error, UsageError) as error:
                yield f"{path} line {rows.line_num}", UsageError(str(error))
                continue
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
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 inside a prompt
        if line.strip():
            where = f"{path} line {number}"
            try:
                _check_text(line)
                yield where, read_object(line, line.strip()[:60], UsageError, EXAMPLE)
            except UsageError as error:
                yield where, error


def _check_text(line: str) -> None:
    """Raises UsageError for a line of a file with bytes that are no text."""
    if "\0" in line:
        raise UsageError("holds a NUL byte, expected text")
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"not UTF-8 (character {error.start + 1})", "iconv -f latin1 -t utf-8 FILE") from error


def spread(job: Job) -> list[Job]:
    """A folder as a condition stands for all pictures in it: a job each. Several folders are paired by name, without
    the kind. Raises InputError for a folder without pictures or one without the partner of another's."""
    from controlnet.preprocessors.images import suffixes

    folders = [(k, flag) for k, flag in enumerate(job.cond) if flag.path != "-" and is_dir(flag.path)]
    if not folders:
        return [job]
    found: list[dict[str, str]] = []
    for _, flag in folders:
        paths = sorted(p for p in Path(flag.path).iterdir() if p.suffix.lower() in suffixes())
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


def check_names(job: Job) -> None:
    """Raises UsageError or InputError for models, kinds, schedulers and files that cannot be: in a moment, before a
    library is loaded that takes seconds."""
    from controlnet.model.registry import BASES, check_base_name, check_net_name, net_for
    from controlnet.model.sampling.schedulers import check_scheduler_name
    from controlnet.preprocessors.detectors.registry import find_detector

    check_base_name(job.base)
    if job.scheduler is not None:
        check_scheduler_name(job.scheduler)
    for flag in job.cond:
        for path in filter(None, (flag.path, flag.region)):
            if path != "-" and not exists(path):
                raise InputError(f"{path}: no such file", f"ls {quote(str(Path(path).parent))}")
        if flag.detect is not None:
            find_detector(flag.detect)
        if flag.net is not None:
            check_net_name(flag.net)
            continue
        kind = flag.kind or flag.detect
        if kind is None and flag.path != "-" and is_file(flag.path):
            kind = kind_of(flag.path, text_of(Path(flag.path)))
        if kind and job.base in BASES and net_for(BASES[job.base].family, kind) is None:
            raise no_net(flag.path, kind, job.base, BASES[job.base].family)


def no_net(path: str, kind: str, base: str, family: str) -> ModelError:
    """The error for a kind that the table has no ControlNet for."""
    from controlnet.model.registry import NETS

    has = [net.kind for net in NETS.values() if net.family == family]
    near = difflib.get_close_matches(kind, has, 1)
    return ModelError(
        f"{path}: no ControlNet is known for kind {kind!r} on base {base}"
        + (f"; there are some for: {', '.join(has)}" if has else ""),
        f"kind={near[0]}" if near else f"--cond {path},net=FOLDER",
    )


@dataclass(frozen=True)
class Wanted:
    """An image to be made: where it goes (None: standard output), and what of."""

    name: str
    job: Job
    seed: int
    path: Path | None


def targets(jobs: list[tuple[str, Job]], overwrite: bool, skip_existing: bool, as_json: bool,
            failed: Callable[[str, ControlNetError], None], keep_best: int | None = None) -> list[Wanted]:  # fmt: skip
    """The images to be made, after what is there has been told of. An output that is in the way fails its job. Of a
    job's images `keep_best` are written, all by default; a single one may have a name of its own."""
    wanted: list[Wanted] = []
    taken: dict[Path | None, str] = {}
    several = sum(keep_best or job.num for _, job in jobs) > 1
    for name, job in jobs:
        try:
            seeded = job.seeded()
            assert seeded.seed is not None
            images: list[Wanted] = []
            for seed in range(seeded.seed, seeded.seed + job.num):
                default = Path("out") / f"{seed}-{job.stem}.png"
                alone = (keep_best or job.num) == 1 and (not several or (job.out or "").endswith(".png"))
                path = output_path(job.out, default, not alone)
                if images and images[0].path == path:  # the best one goes there
                    images.append(Wanted(name, seeded, seed, path))
                    continue
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
