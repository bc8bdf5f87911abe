"""Stage one on a video: frame after frame, several in work at once, to a folder of maps or to one video."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.model.work.maps import Detection, Made, in_turn, small, stays
from controlnet.model.work.outputs import IMAGES, keeps
from controlnet.preprocessors import clips, steady
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.errors import ControlNetError, UsageError
from controlnet.preprocessors.files import exists, is_dir, is_file, write_file
from controlnet.preprocessors.films import ENDINGS, WRITTEN
from controlnet.preprocessors.kinds import kind_named
from controlnet.preprocessors.remote import place
from controlnet.preprocessors.stage_one import stage_one

WHOLE = 0.98
"""The share of a video's frames that must be readable: headers are a little off."""


@dataclass(frozen=True)
class ClipJob:
    """What is to be done with a video."""

    job: Detection
    clip: clips.Clip
    out: Path
    """A folder for its frames' maps, or a video file."""
    every: int = 1
    steady: bool = False

    @property
    def count(self) -> int:
        """How many maps there will be, as far as its header says."""
        return -(-self.clip.count // self.every)

    @property
    def to_video(self) -> bool:
        return self.out.suffix.lower() in WRITTEN


def place_of(source: str, out: str | None, kind: str, several: bool) -> Path:
    """Where a video's maps go: as -o says, by default a folder beside it. Raises UsageError."""
    own = place(source)
    if out is None:
        return own.with_name(f"{own.stem}.{kind}")
    folder = out.endswith("/") or is_dir(out)
    if out == "-" or (not folder and out.lower().endswith(IMAGES)):
        raise UsageError(f"-o {out}: maps of a video go to a folder or a video", f"-o {own.stem}.{kind}/")
    if not folder and out.lower().endswith(ENDINGS):
        if several:
            raise UsageError(f"-o {out}: takes the maps of one video", "-o maps/")
        if not out.lower().endswith(WRITTEN):
            raise UsageError(f"-o {out}: videos are written as {', '.join(WRITTEN)}", "-o maps.mp4")
        if exists(out) and place(out).resolve() == own.resolve():
            raise UsageError(f"-o {out}: is the video itself", f"-o {own.stem}.{kind}{own.suffix}")
        return place(out)
    return place(out) / f"{own.stem}.{kind}" if several else place(out)


def check(asked: ClipJob) -> None:
    """Raises UsageError for what cannot be done with a video."""
    kind = asked.job.detector.kind
    if asked.steady:
        steady.check(kind)
        if asked.job.skip_existing and not asked.to_video:
            raise UsageError("--steady --skip-existing: a steady map follows from the one before it", "--overwrite")
    if asked.to_video and kind_named(kind).hides:
        raise UsageError(f"{kind} maps hide a part, which a video cannot", f"-o {asked.out.with_suffix('')}/")


def run(asked: ClipJob, previews: int, say: Callable[[str], None] = lambda text: None) -> Iterator[Made]:
    """What became of every frame, in turn; of a video that is written, a result without fields for each frame and one
    for the whole at the end. The first `previews` frames come with a small photo and map. Where nothing is found the
    map is black, or with `steady` for some frames what was there before. Raises what else a frame raises."""
    check(asked)
    asked = replace(asked, job=_empty_allowed(asked.job))
    name, kind = Path(asked.clip.path).name, asked.job.detector.kind
    told = {"output": str(asked.out), "source": name, "kind": kind}
    if asked.to_video and keeps(asked.out, asked.job.overwrite, asked.job.skip_existing):
        yield Made(told | {"skipped": True})
        return
    digest = _sha256(asked.clip.path)
    calm = steady.Steady() if asked.steady else None
    done = last = nothing = 0
    with ExitStack() as stack:
        add: Callable[[np.ndarray], Any] | None = None
        looked = in_turn(lambda one: _look(asked, name, digest, *one), asked.clip.frames(asked.every))
        for number, frame, condition in looked:
            last = number
            if condition is None:  # its map is there already
                yield Made(told | {"output": str(_file(asked, number)), "frame": number, "skipped": True})
                continue
            nothing += not condition.map.any()
            condition = calm(condition) if calm is not None else condition
            shown = small(frame, condition, asked.job.resize) if done < previews else None
            done += 1
            if not asked.to_video:
                write_file(_file(asked, number), condition.png())
                yield Made({"output": str(_file(asked, number)), **condition.record}, preview=shown)
                continue
            if add is None:
                add = stack.enter_context(clips.written(asked.out, condition.size, asked.clip.rate / asked.every))
            add(_eight_bits(condition))
            yield Made({}, preview=shown)
    if nothing:
        say(f"warning: {name}: nothing is found on {nothing} of {done} frames")
    if last + asked.every < asked.clip.count * WHOLE:
        say(f"warning: {name}: only {last + 1} of its {asked.clip.count} frames can be read")
    if asked.to_video:
        yield Made(told | {"frames": done})


def _file(asked: ClipJob, number: int) -> Path:
    return asked.out / f"{number:06d}.{asked.job.detector.kind}.png"


def _look(
    asked: ClipJob, name: str, digest: str, number: int, frame: np.ndarray
) -> tuple[int, np.ndarray, Condition | None]:
    job = asked.job
    if not asked.to_video:
        target, more = _file(asked, number), {"frame": number}
        if job.skip_existing and is_file(target) and stays(job, target, name, digest, more):
            return number, frame, None
        keeps(target, job.overwrite or job.skip_existing, skip_existing=False)
    assert job.ready is not None
    try:
        condition = stage_one(frame, job.ready, job.size, job.resize, name, digest)
    except ControlNetError as error:
        raise type(error)(f"{name}: frame {number}: {error}", error.hint) from error
    return number, frame, replace(condition, record=condition.record | {"frame": number})


def _empty_allowed(job: Detection) -> Detection:
    """The same with black maps where nobody is found."""
    if job.ready is None or not hasattr(job.options, "allow_empty"):
        return job
    options = replace(job.options, allow_empty=True)
    return replace(job, options=options, ready=replace(job.ready, options=options))


def _eight_bits(condition: Condition) -> np.ndarray:
    rgb = condition.rgb
    return rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
