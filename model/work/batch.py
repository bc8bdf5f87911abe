"""Many jobs: read from a file, spread over folders of conditions, and the images that they ask for. Loads no model."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

from controlnet.model.work.jobs import Job, stem_of
from controlnet.model.work.outputs import IMAGES, keeps, output_path
from controlnet.preprocessors.errors import ControlNetError, InputError, OutputError, UsageError
from controlnet.preprocessors.files import decoded, is_dir, is_file
from controlnet.preprocessors.jsons import read_object
from controlnet.preprocessors.remote import is_url, place

TOGETHER = 4
"""How many images are sampled together. It bounds the memory; no image depends on it but for rounding."""
START, MASK = -1, -2
"""The places of the picture to start from and of its mask, beside those of the conditions."""
EXAMPLE = '{"cond": "map.canny.png", "prompt": "..."}'


Line = tuple[str, dict[str, Any] | UsageError]
"""Where a job is said, and what is given; or why it is none."""


def read_jobs_file(path: str) -> list[Line]:
    """The jobs of a file on this machine or behind a URL: JSON Lines, CSV (`read_jobs`), Parquet with a column for each
    key, or tar files as WebDataset has them, also several, {000..009}.tar. Raises InputError."""
    if path.endswith((".tar", ".parquet")):
        from controlnet.model.work import packed  # it imports the picture libraries

        return list(packed.read(path))
    from controlnet.preprocessors.images import read_bytes

    empty = not is_url(path) and is_file(path) and Path(path).stat().st_size == 0
    return list(read_jobs(path, b"" if empty else read_bytes(path)))


def _is_binary(head: bytes) -> bool:
    """Whether a file that begins so is a picture, an archive or the like: not text with a bad line in it."""
    first = head.splitlines()[0]
    return b"\0" in head and (b"\0" in first or "\ufffd" in first.decode(errors="replace"))


def read_jobs(path: str, data: bytes) -> Iterator[Line]:
    """(where, what is given) for every job in a file: JSON Lines, or CSV with the keys in its first line and a job's
    conditions separated by |. A line that is not a job yields its error. Raises InputError for a file without jobs."""
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        decoded(data, path)  # raises: every line of it is unreadable
    if not data.strip():
        raise InputError(f"{path}: no jobs in it", f"{EXAMPLE}   (one per line)")
    if _is_binary(data[:1000]):
        raise InputError(f"{path}: is not text, expected jobs", f"{EXAMPLE}   (one per line)")
    # Bytes that are not UTF-8 spoil only their own line.
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
            if given.get("negative") == "":  # an empty cell: not given
                del given["negative"]
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
    """Raises UsageError for a line with bytes that are not text."""
    if "\0" in line:
        raise UsageError("holds a NUL byte, expected text")
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"not UTF-8 (character {error.start + 1})", "iconv -f latin1 -t utf-8 FILE") from error


def spread(job: Job) -> list[Job]:
    """A job for each picture, if a condition or the picture to start from is a folder of them. The pictures of several
    folders are paired by name, without the kind. Raises InputError for a folder without pictures, and for a picture
    without its partner in another folder."""
    from controlnet.preprocessors.images import suffixes

    paths: dict[int, str] = {k: flag.path for k, flag in enumerate(job.cond)}
    paths |= {k: path for k, path in ((START, job.init), (MASK, job.mask)) if path is not None}
    folders = [(k, path) for k, path in paths.items() if path != "-" and is_dir(path)]
    if not folders:
        return [job]
    if job.same_seed:
        job = job.seeded(fixed=True)

    # The pictures of each folder by name; all folders must have the same names.
    found: list[dict[str, str]] = []
    for number, folder in folders:
        pictures = sorted(p for p in place(folder).iterdir() if p.suffix.lower() in suffixes())
        stems = {stem_of(str(p)): str(p) for p in pictures}
        if not stems:
            hint = "a folder of pictures" if number < 0 else f"controlnet detect canny PHOTOS -o {folder}"
            raise InputError(f"{folder}: the folder holds no pictures", hint)
        if len(stems) < len(pictures):
            raise InputError(f"{folder}: holds several maps of one photo", "a folder for each kind")
        found.append(stems)
        if lacking := sorted(found[0].keys() ^ stems.keys()):
            raise InputError(
                f"{folders[0][1]} and {folder}: {lacking[0]} is in one and not in the other",
                "give both folders pictures of the same names",
            )

    # A job for each name.
    jobs = []
    for stem in found[0]:
        own = paths | {k: stems[stem] for (k, _), stems in zip(folders, found, strict=True)}
        flags = tuple(replace(flag, path=own[k]) for k, flag in enumerate(job.cond))
        jobs.append(replace(job, cond=flags, init=own.get(START), mask=own.get(MASK)))
    return jobs


@dataclass(frozen=True)
class Wanted:
    """An image that is asked for: its job and seed, and where it goes (None: standard output)."""

    name: str
    job: Job
    seed: int
    path: Path | None
    there: bool = False
    """Whether it is there already, and stays."""
    number: int = 0
    """Its place among all that are asked for."""
    unit: int = 0
    """Images of one unit are made by one process, those that agree in everything shared at once (see `in_units`)."""
    asked: str = ""
    """`Job.content`, the same on every machine."""

    @property
    def content(self) -> str:
        """What tells the image from all others that are asked for."""
        return json.dumps([self.asked, self.seed])


def in_units(wanted: list[Wanted], by_job: bool = False) -> list[list[Wanted]]:
    """The images in groups that are made together: up to TOGETHER neighbours that look alike. The groups do not depend
    on what is there already or on who makes them, so an image is the same, bit for bit, in every shard and after every
    interruption. With `by_job` all images of a job are one group."""
    looks = {id(one.job): id(one.job) if by_job else one.job.looks() for one in wanted}
    units: list[list[Wanted]] = []
    for _, alike in groupby(wanted, lambda one: looks[id(one.job)]):
        images = list(alike)
        size = len(images) if by_job else TOGETHER
        units += [images[i : i + size] for i in range(0, len(images), size)]
    counter = count()
    return [[replace(one, unit=i, number=next(counter)) for one in unit] for i, unit in enumerate(units)]


def in_tars(units: list[list[Wanted]], size: int) -> list[list[Wanted]]:
    """Units in the groups of about `size` images that go into a tar file each; a unit is not divided."""
    tars: list[list[Wanted]] = [[]]
    for unit in units:
        if len(tars[-1]) + len(unit) > size and tars[-1]:
            tars.append([])
        tars[-1] += unit
    return [tar for tar in tars if tar]


def stems_of(jobs: list[Job]) -> dict[int, str]:
    """The stem of each job's file names, by the job's `id`: its own, and with the other pictures' names where jobs that
    have the same prompt and seed would be named alike."""
    alike = Counter((job.out, job.seed, job.prompt, job.stem) for job in jobs)
    return {id(job): job.stem if alike[job.out, job.seed, job.prompt, job.stem] == 1 else job.long_stem for job in jobs}


def targets(
    jobs: list[tuple[str, Job]],
    overwrite: bool,
    skip_existing: bool,
    failed: Callable[[str, ControlNetError], None],
    keep_best: int | None = None,
    sharded: bool = False,
    in_tars: bool = False,
    folder: str | None = None,
) -> list[Wanted]:
    """The images that are asked for, also those that are there already and stay. A job fails if its output path is
    taken. `keep_best` of a job's images are written, by default all; a single one may have a file name of its own. Of
    `sharded` jobs others make images meanwhile, and seeds that are not given follow from the job; neither depends on
    the `folder` of all results. Images that go into tar files have no path yet."""
    wanted: list[Wanted] = []
    taken: dict[Path | None, str] = {}
    several = sum(keep_best or job.num for _, job in jobs) > 1
    stems = stems_of([job for _, job in jobs])
    for name, job in jobs:
        try:
            seeded = job.seeded(sharded, folder)
            assert seeded.seed is not None
            one = Wanted(name, seeded, seeded.seed, None, asked=seeded.content(folder))
            if in_tars:  # the files inside have names of their own
                wanted += [replace(one, seed=seed) for seed in range(seeded.seed, seeded.seed + job.num)]
                continue
            images: list[Wanted] = []
            for seed in range(seeded.seed, seeded.seed + job.num):
                default = Path("out") / f"{seed}-{stems[id(job)]}.png"
                alone = (keep_best or job.num) == 1 and (not several or (job.out or "").lower().endswith(IMAGES))
                path = output_path(job.out, default, not alone, IMAGES)
                if images and images[0].path == path:  # the best one goes there
                    images.append(replace(one, seed=seed, path=path))
                    continue
                if (
                    job.seed is None
                    and skip_existing
                    and not sharded
                    and path is not None
                    and path.name == default.name
                ):
                    raise UsageError("without a seed its images have new names each time", "--seed 1")
                if path in taken:
                    raise OutputError(f"{path}: {taken[path]} is written there too", "a seed or an out of its own")
                there = path is not None and keeps(path, overwrite, skip_existing or sharded)
                images.append(replace(one, seed=seed, path=path, there=there))
                if path is not None:
                    taken[path] = name
            wanted += images
        except ControlNetError as error:
            failed(name, error)
    return wanted
