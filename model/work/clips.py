"""Stage one on a video: frame after frame, several in work at once, to a folder of maps or to one video."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.model.work.maps import Detection, Made, in_turn, small
from controlnet.model.work.outputs import keeps
from controlnet.preprocessors import clips, steady
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.errors import ControlNetError, NothingFoundError, OutputError, UsageError
from controlnet.preprocessors.files import is_file, write_file
from controlnet.preprocessors.remote import place
from controlnet.preprocessors.stage_one import stage_one


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
        return self.out.suffix.lower() in clips.WRITTEN


def place_of(source: str, out: str | None, kind: str, several: bool) -> Path:
    """Where a video's maps go: as -o says, by default a folder beside it. Raises UsageError."""
    own = place(source)
    if out is None:
        return own.with_name(f"{own.stem}.{kind}")
    if out == "-":
        raise UsageError("maps of a video do not go to standard output", f"-o {own.stem}.{kind}/")
    if out.lower().endswith(clips.WRITTEN):
        if several:
            raise UsageError(f"-o {out}: takes the maps of one video", "-o maps/")
        return place(out)
    if out.lower().endswith(clips.ENDINGS):
        raise UsageError(f"-o {out}: videos are written as {', '.join(clips.WRITTEN)}", "-o maps.mp4")
    return place(out) / f"{own.stem}.{kind}" if several else place(out)


def run(asked: ClipJob, previews: int) -> Iterator[Made]:
    """What became of every frame, in turn; of a video that is written, a result without fields for each frame and one
    for the whole at the end. The first `previews`
    frames come with a small photo and map. Raises what a frame raises, if it is not that nothing was found: then the
    map is black, or with `steady` what was there before."""
    if asked.steady:
        steady.check(asked.job.detector.kind)
    if asked.to_video:
        keeps(asked.out, asked.job.overwrite or asked.job.skip_existing, skip_existing=False)
    digest = _sha256(asked.clip.path)
    calm = steady.Steady() if asked.steady else None
    name = Path(asked.clip.path).name
    with ExitStack() as stack:
        add: Callable[[np.ndarray], Any] | None = None
        done = 0
        looked = in_turn(lambda one: _look(asked, name, digest, *one), asked.clip.frames(asked.every))
        for number, frame, condition in looked:
            if condition is None:  # its map is there already
                yield Made({"output": str(_file(asked, number)), "source": name, "kind": asked.job.detector.kind,
                            "frame": number, "skipped": True})  # fmt: skip
                continue
            condition = calm(condition) if calm is not None else condition
            shown = small(frame, condition, asked.job.resize) if done < previews else None
            done += 1
            if asked.to_video:
                if add is None:
                    add = stack.enter_context(clips.written(asked.out, condition.size, asked.clip.rate / asked.every))
                add(_eight_bits(condition))
                yield Made({}, preview=shown)
                continue
            write_file(_file(asked, number), condition.png())
            yield Made({"output": str(_file(asked, number)), **condition.record}, preview=shown)
    if asked.to_video:
        if add is None:
            raise OutputError(f"{asked.out}: no frame to write", "--every 1")
        yield Made({"output": str(asked.out), "source": name, "kind": asked.job.detector.kind, "frames": done})


def _file(asked: ClipJob, number: int) -> Path:
    return asked.out / f"{number:06d}.{asked.job.detector.kind}.png"


def _look(
    asked: ClipJob, name: str, digest: str, number: int, frame: np.ndarray
) -> tuple[int, np.ndarray, Condition | None]:
    job = asked.job
    if not asked.to_video:
        target = _file(asked, number)
        if not asked.steady and job.skip_existing and is_file(target):
            return number, frame, None
        keeps(target, job.overwrite or job.skip_existing, skip_existing=False)
    assert job.ready is not None
    try:
        condition = stage_one(frame, job.ready, job.size, job.resize, name, digest)
    except NothingFoundError:
        condition = _nothing(job, frame, name, digest)
    except ControlNetError as error:
        raise type(error)(f"{name}: frame {number}: {error}", error.hint) from error
    return number, frame, replace(condition, record=condition.record | {"frame": number})


def _nothing(job: Detection, frame: np.ndarray, name: str, digest: str) -> Condition:
    """The map of a frame on which nothing is found: black."""
    options = replace(job.options, allow_empty=True) if hasattr(job.options, "allow_empty") else job.options
    assert job.ready is not None
    return stage_one(frame, replace(job.ready, options=options), job.size, job.resize, name, digest)


def _eight_bits(condition: Condition) -> np.ndarray:
    rgb = condition.rgb
    return rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
