"""What the jobs of a studio read from files: conditions on the canvas, pictures to start from, masks, regions.

Equal questions are answered once: jobs next to each other often share a picture, and what is the same object is
computed once (see `sampling.generate.Encoded`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from shlex import quote

import numpy as np
from controlnet.model.sampling.canvas import detection_size, on_canvas, to_canvas
from controlnet.model.training.runfolder import RunFolder
from controlnet.model.work.condition import OWN, ConditionFlag
from controlnet.model.work.jobs import Job
from controlnet.model.work.paint import Painting, read_painting, with_hidden
from controlnet.preprocessors.condition import Condition, recorded
from controlnet.preprocessors.detectors.detector import Ready
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.doubts import doubts_of
from controlnet.preprocessors.errors import InputError, NothingFoundError, UsageError
from controlnet.preprocessors.geometry import Box, fit, inside
from controlnet.preprocessors.images import alpha_of, read_bytes, read_image
from controlnet.preprocessors.jsons import object_or_empty
from controlnet.preprocessors.metadata import kind_of, load, sha256
from controlnet.preprocessors.stage_one import stage_one


class Pictures:
    """Reads pictures. `say` is called with each line of talk; with `strict` a condition that looks wrong is an error.

    A box (geometry.Box) is the part of a picture that a canvas shows, or None for all of it."""

    def __init__(self, offline: bool, strict: bool, say: Callable[[str], None]):
        self.offline, self.strict, self.say = offline, strict, say
        self.told: set[str] = set()
        self.detector = cache(self._detector)
        self.kind = lru_cache(64)(self._kind)
        self.picture = lru_cache(8)(self._picture)
        self.condition = lru_cache(8)(self._condition)
        self.placed = lru_cache(8)(self._placed)
        self.hiding = lru_cache(8)(self._hiding)
        self.region = lru_cache(8)(self._region)
        self.part = lru_cache(8)(self._part)
        self.start = lru_cache(8)(self._start)
        self.read_painting = lru_cache(8)(partial(read_painting, say=self.warn))
        self.painted = lru_cache(8)(Painting.on_canvas)

    def warn(self, text: str) -> None:
        """Say it, once."""
        if text not in self.told:
            self.told.add(text)
            self.say(f"warning: {text}")

    def painting(self, job: Job) -> Painting | None:
        """What a job paints, the same object for all jobs that paint the same; None for a job that paints nothing."""
        if job.mask is None:
            return None
        return self.read_painting(job.init, job.mask, job.invert_mask, job.feather, job.region_only)

    def _picture(self, path: str) -> tuple[np.ndarray, dict[str, str], str]:
        """(image, its PNG text, its bytes' sha256) of a picture file."""
        data = read_bytes(path)
        image, text = read_image(data, path, self.warn)
        return image, text, sha256(data)

    def _start(self, path: str, size: tuple[int, int]) -> tuple[np.ndarray, str]:
        """The picture to start from, on the canvas: its middle, (H, W, 3) uint8; and the sha256 of its file."""
        picture, _, digest = self.picture(path)
        return fit(picture, size, "crop"), digest

    def _kind(self, flag: ConditionFlag) -> str:
        """The kind of a condition: what the flag says if it is to be detected, else as in `_kind_of`."""
        if flag.detect is not None:
            return flag.kind or flag.detect
        return _kind_of(flag, self.picture(flag.path)[1])

    def _detector(self, kind: str) -> Ready:
        row = find_detector(kind)
        return row.ready(row.load_options()(), offline=self.offline)

    def _condition(
        self, flag: ConditionFlag, canvas: tuple[int, int] | None = None, box: Box | None = None
    ) -> Condition:
        """A condition from its file, or detected for a canvas (width, height) if the flag says `detect`."""
        image, text, digest = self.picture(flag.path)
        if flag.detect is None:
            alpha = alpha_of(read_bytes(flag.path))
            found = replace(recorded(image, self.kind(flag), flag.path, load(text)), alpha=alpha)
            return found if box is None else found.within(box)
        assert canvas is not None
        ready = self.detector(flag.detect)
        try:
            resize = "crop" if box is None else "stretch"
            made = stage_one(inside(image, box), ready, detection_size(canvas), resize, flag.path, digest)
        except NothingFoundError as error:  # its hint is for `detect`
            map_ = f"controlnet detect {flag.detect} {quote(flag.path)}"
            raise NothingFoundError(f"{flag.path}: {error}", f"{map_}, with other options; then --cond MAP") from error
        return recorded(made.map, self.kind(flag), flag.path, made.record)

    def _placed(self, flag: ConditionFlag, condition: Condition, size: tuple[int, int]) -> np.ndarray:
        """The condition's map on the canvas. What looks wrong with it is a warning, or an error when strict."""
        for doubt in doubts_of(condition, size):
            if self.strict:
                raise InputError(f"{flag.path}: {doubt.text}", doubt.cure)
            self.warn(f"{flag.path}: {doubt.text}; {doubt.cure}")
        return on_canvas(condition, size).map

    def _hiding(
        self, flag: ConditionFlag, condition: Condition, size: tuple[int, int], painting: Painting | None
    ) -> np.ndarray:
        """A map that hides what is painted, or what is transparent in its file."""
        return with_hidden(flag.path, self.placed(flag, condition, size), condition, painting)

    def _part(self, painting: Painting, rest: bool, size: tuple[int, int]) -> np.ndarray:
        """What is painted, or the rest of it, as a region (H, W) float32 on the canvas."""
        _, painted = self.painted(painting, size)
        return (painted ^ rest).astype(np.float32)

    def _region(self, path: str, size: tuple[int, int], box: Box | None = None) -> tuple[np.ndarray, str]:
        """(H, W) float32 in [0, 1] on the canvas, and the sha256 of its file."""
        image, _, digest = self.picture(path)
        image = inside(image, box)
        if box is None and (image.shape[1], image.shape[0]) != size:
            self.say(f"{path}: region of {image.shape[1]}x{image.shape[0]} brought to the canvas {size[0]}x{size[1]}")
        mask = to_canvas(image, "region", size).mean(2, dtype=np.float32) / 255
        if not mask.any():
            self.warn(f"{path}: the region is black everywhere, so its ControlNet does not act")
        return mask, digest


def _kind_of(flag: ConditionFlag, text: dict[str, str]) -> str:
    """The kind of a map: given, or from its PNG text or name, or from the training run that made its ControlNet. With
    any other ControlNet of the user's own it is "own"."""
    run = RunFolder(Path(flag.net)) if flag.net else None
    settings = object_or_empty(run.record.read_bytes()).get("settings") if run and run.holds_run else None
    trained = settings.get("kind") if isinstance(settings, dict) else None
    try:
        return kind_of(flag.path, text, flag.kind)
    except UsageError:
        if flag.net:
            return trained or OWN
        raise
