"""Makes an image again from its own record; measures how far off the result is, and lists what differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.model.sampling.schedulers import SCHEDULERS
from controlnet.model.work.batch import Wanted
from controlnet.model.work.condition import ConditionFlag, found_now, parse_scale, parse_weighting, where_now
from controlnet.model.work.jobs import ALPHA, OPTIONS, Job
from controlnet.model.work.options import embedding_of, lora_of
from controlnet.model.work.prepared import Image
from controlnet.model.work.studio import Studio
from controlnet.preprocessors.devices import choose_device
from controlnet.preprocessors.errors import InputError, UsageError, reason
from controlnet.preprocessors.files import is_file
from controlnet.preprocessors.images import read_bytes, read_image
from controlnet.preprocessors.metadata import load
from controlnet.preprocessors.tars import is_member

MOST_TOGETHER = 64
WHOLE = "replay the file that generate wrote"


@dataclass(frozen=True, eq=False)
class Recorded:
    """An image file with its record."""

    path: Path
    pixels: np.ndarray
    record: dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Between two images of equal size, in levels of 0 to 255."""

    largest: int
    mean: float
    changed: float
    """The share of pixels that differ at all."""


def read_recorded(path: Path) -> Recorded:
    """An image file with its record. Raises InputError if it has none."""
    pixels, text = read_image(read_bytes(str(path)), str(path))
    record = load(text)
    if "prompt" not in record or "seed" not in record:
        raise InputError(f"{path}: holds no record of generate", "an image as controlnet generate wrote it")
    return Recorded(path, pixels, record)


def remake(
    image: Recorded,
    job: Job,
    device: str | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Image:
    """Make an image again. `job` is `job_of(image)`, or a changed copy of it. The image is made on `device`, by default
    the recorded one, if this machine has it, and in the recorded number type. Raises as `Studio.make` does."""
    record = image.record
    studio = _studio(record, device, offline, say)
    # Away from the base's native size, rounding makes an image depend on how many are sampled together and on its place
    # among them; so the same number is sampled again.
    paths = [flag.path for flag in job.cond]
    adapters = [[lora_of(text)[0] for text in job.lora], [embedding_of(text)[0] for text in job.embedding]]
    same = job == replace(job_of(image, paths, job.init, job.mask, *adapters), vae=job.vae)  # wherever that is now
    together, place = _batch(record) if same else (1, 0)
    copies = [Wanted("", job, job.seed or 0, None)] * together
    return list(studio.make(copies))[place]


def _studio(record: dict[str, Any], device: str | None, offline: bool, say: Callable[[str], None]) -> Studio:
    """A studio as the record says; torch runs the networks where the recorded engine cannot."""
    make = partial(
        Studio, _available(device or record.get("device")), record.get("dtype"), offline,
        low_memory=bool(record.get("low_memory")), say=say,
    )  # fmt: skip
    try:
        return make(engine=record.get("engine") or "eager")
    except UsageError:
        return make(engine="eager")


def replay(path: str | Path, device: str | None = None) -> tuple[Image, Difference, list[str]]:
    """Make an image file again from its record; returns the image, how far off it is, and what differs, one line
    each."""
    before = read_recorded(Path(path))
    after = remake(before, job_of(before), device)
    return after, compare(before, after), changes(before.record, after.record)


def compare(before: Recorded, after: Image) -> Difference:
    """How far an image is from what it was. Where the file keeps pixels only nearly, both went through one."""
    off = np.abs(before.pixels.astype(int) - after.pixels_in(before.path.suffix.lower()))
    return Difference(int(off.max()), float(off.mean()), float((off.max(2) > 0).mean()))


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """How two records differ in models, conditions and machine, one line each."""
    found = []
    for name in (
        "base_sha256",
        "vae_sha256",
        "init_sha256",
        "mask_sha256",
        "adapters_sha256",
        "device",
        "dtype",
        "threads",
        "low_memory",
        "engine",
        "batch",
    ):
        if (before.get(name) or None) != (after.get(name) or None):
            found.append(f"{name}: {before.get(name)}, now {after.get(name)}")
    for name, version in after["versions"].items():
        if (was := (before.get("versions") or {}).get(name)) != version:
            found.append(f"{name}: {was}, now {version}")
    for old, new in zip(before.get("conditions") or [], after["conditions"], strict=False):
        for name in ("sha256", "map_sha256", "net_sha256", "region_sha256"):
            if old.get(name) != new.get(name):
                found.append(f"{new['path']}: {name} {str(old.get(name))[:12]}, now {str(new.get(name))[:12]}")
    return found


def job_of(
    image: Recorded,
    moved: list[str] | None = None,
    init: str | None = None,
    mask: str | None = None,
    lora: list[str] | None = None,
    embedding: list[str] | None = None,
) -> Job:
    """The job in an image's record; `moved` are the conditions' present paths, in the recorded order, `init` and `mask`
    those of the picture that it started from and of its mask, `lora` and `embedding` the present places of its adapters
    in that order, without scale or word. Raises InputError for a record that `generate` cannot have written and for a
    picture that is not there, UsageError for paths of what the image does not have."""
    record = image.record
    _check(record, _RECORD, image.path)
    conditions = record.get("conditions") or []
    for condition in conditions:
        _check(condition, _CONDITION, image.path)
    if moved and len(moved) != len(conditions):
        raise UsageError(
            f"--cond is given {len(moved)} times, the image has {len(conditions)} conditions",
            "one for each, in the order of its record",
        )
    pictures = {name: _picture(image, name, given) for name, given in (("init", init), ("mask", mask))}
    adapters = {
        "lora": _adapters(image, "lora", lora, lora_of),
        "embedding": _adapters(image, "embedding", embedding, embedding_of),
    }
    try:
        values = {name: record[name] for name, option in OPTIONS.items() if option.recorded and name in record}
        if record["scheduler"] not in SCHEDULERS:  # the class name of the base's own scheduler
            del values["scheduler"]
        flags = [_flag(c, image.path, moved[k] if moved else None) for k, c in enumerate(conditions)]
        values |= pictures | adapters
        values.setdefault("plain_prompt", True)  # as before prompts could have weights
        return Job(tuple(flags), **values | {"control_on": record.get("control_on") or "both"})
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise InputError(f"{image.path}: its record is not whole ({reason(error)})", WHOLE) from error


_RECORD: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "negative": (str, type(None)), "steps": (int,), "guidance": (int, float), "base": (str,),
    "size": (list,), "seed": (int,), "scheduler": (str,), "conditions": (list, type(None)),
    "control_on": (str, type(None)), "device": (str, type(None)), "dtype": (str, type(None)),
    "versions": (dict, type(None)), "init": (str, type(None)), "mask": (str, type(None)),
    "engine": (str, type(None)), "strength": (int, float, type(None)), "hires": (int, float, type(None)),
}  # fmt: skip
_CONDITION: dict[str, tuple[type, ...]] = {
    "path": (str,), "kind": (str,), "net": (str,), "scale": (int, float, str), "start": (int, float),
    "end": (int, float), "weighting": (str, type(None)), "region": (str, type(None)), "detect": (dict, type(None)),
}  # fmt: skip
"""The fields of a record and their types; a field that may be None may also be missing."""


def _check(fields: Any, types: dict[str, tuple[type, ...]], image: Path) -> None:
    wrong = "a condition" if not isinstance(fields, dict) else None
    for name, known in types.items():
        if wrong is None and (not isinstance(fields.get(name), known) or isinstance(fields.get(name), bool)):
            wrong = f"{name}: {fields.get(name)!r}"
    if wrong:
        raise InputError(f"{image}: its record is not whole ({wrong})", WHOLE)


def _flag(condition: dict[str, Any], image: Path, moved: str | None) -> ConditionFlag:
    path = found_now(moved or condition["path"], image, "replay")
    scale, detect = condition["scale"], condition.get("detect") or {}
    return ConditionFlag(
        path,
        str(detect["kind"]) if detect else None,
        condition["kind"],
        condition["net"],
        parse_scale("scale", str(scale)),
        condition["start"],
        condition["end"],
        parse_weighting("weighting", condition.get("weighting") or "uniform"),
        condition.get("region"),
    )


def _picture(image: Recorded, name: str, given: str | None) -> str | None:
    """Where the picture that an image started from, or its mask, is now."""
    recorded = image.record.get(name)
    if recorded is None:
        if given is not None:
            raise UsageError(f"--{name} {given}: the image has none in its record", f"without --{name}")
        return None
    path = given or (recorded if recorded == ALPHA else where_now(recorded, image.path))
    if path != ALPHA and not (is_file(path) or is_member(path)):
        raise InputError(f"{path}: no such file", f"controlnet replay {image.path} --{name} FILE says where it is now")
    return path


def _adapters(image: Recorded, name: str, given: list[str] | None, split: Callable[[str], tuple]) -> list[str]:
    """The LoRAs or learned words of an image, `FILE:scale` or `FILE:word`, where they are now."""
    recorded = [str(one) for one in image.record.get(name) or []]
    if given and len(given) != len(recorded):
        raise UsageError(
            f"--{name} is given {len(given)} times, the image has {len(recorded)} in its record",
            "one for each, in the order of its record",
        )
    found = []
    for k, text in enumerate(recorded):
        source, end = split(text)
        now = given[k] if given else where_now(source, image.path)
        found.append(now if end in (None, 1.0) else f"{now}:{end}")
    return found


def _batch(record: dict[str, Any]) -> tuple[int, int]:
    """(how many images were sampled together, this one's place among them), as recorded."""
    count, place = record.get("batch", 1), record.get("place", 0)
    if isinstance(count, int) and isinstance(place, int) and 0 <= place < count <= MOST_TOGETHER:
        return count, place
    return 1, 0


def _available(device: str | None) -> str | None:
    """The recorded device if this machine has it, else the default one."""
    try:
        return str(choose_device(device))
    except UsageError:
        return None
