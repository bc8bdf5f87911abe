"""Stage two for many jobs: conditions read, each model loaded once, images of equal settings made together.

for image in Studio().images(Job("map.canny.png", "a red cube", num=2)):
    Path(f"{image.record['seed']}.png").write_bytes(image.png())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from controlnet.model.base import Base
from controlnet.model.control.strength import Strength
from controlnet.model.files.hashes import model_hash
from controlnet.model.registry import NETS, recorded_name
from controlnet.model.sampling.canvas import canvas_size, own_size
from controlnet.model.sampling.generate import Encoded, Request, generate
from controlnet.model.sampling.loop import count_evaluations
from controlnet.model.sampling.memory import check_memory
from controlnet.model.sampling.schedulers import make_scheduler, name_of
from controlnet.model.work.batch import TOGETHER, Wanted
from controlnet.model.work.condition import (
    PAINTED,
    REST,
    ConditionFlag,
    check_window,
    scale_text,
    weighting_text,
)
from controlnet.model.work.jobs import Job
from controlnet.model.work.machine import (
    is_out_of_memory,
    keep_freed_memory,
    silence_libraries,
)
from controlnet.model.work.models import Models
from controlnet.model.work.named import check_names
from controlnet.model.work.paint import Painting
from controlnet.model.work.pictures import Pictures
from controlnet.model.work.prepared import ActiveCondition, Image, Prepared, versions
from controlnet.model.work.talk import Talk
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.errors import ControlNetError, ModelError
from controlnet.preprocessors.files import whole_path
from controlnet.preprocessors.geometry import WHOLE, Box, inside, window
from controlnet.preprocessors.kinds import kind_named, stands_in
from controlnet.preprocessors.metadata import sha256
from controlnet.preprocessors.stage_one import MAKING

ACTS = ("scale", "start", "end", "weighting", "region", "region_sha256")
"""What a condition's entry in the record says of how it acts."""


def fail(name: str, error: ControlNetError) -> None:
    """What `Studio.make` does about a failed job unless told otherwise."""
    raise error


class Studio:
    """Loads every base and ControlNet once, reads conditions, and makes images.

    `device` and `dtype` are names, or None for the best available. With `offline` the network is never used; with
    `strict` a condition that looks wrong is an error; with `low_memory` each network is on the device only while it
    works. `engine` is what runs the networks (engines/choose.py). `say` is called with each line of talk.
    """

    def __init__(
        self,
        device: str | None = None,
        dtype: str | None = None,
        offline: bool = False,
        strict: bool = False,
        low_memory: bool = False,
        engine: str | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        silence_libraries()
        self.models = Models(device, dtype, offline, low_memory, engine, say)
        self.device, self.dtype, self.sources = self.models.device, self.models.dtype, self.models.sources
        if self.device.type == "cpu" and not low_memory:
            keep_freed_memory()
        self.offline, self.low_memory = offline, low_memory
        self.pictures = Pictures(offline, strict, say)
        self.talk = Talk(say)

    def make(
        self,
        wanted: list[Wanted],
        failed: Callable[[str, ControlNetError], None] = fail,
        on_step: Callable[[float], None] = lambda images: None,
    ) -> Iterator[Image]:
        """Yield one image after another. `failed` is called for each job that fails, and the rest goes on. `on_step` is
        called with the number of images made, fractions included."""
        made = 0
        for _, alike in groupby(self._prepare(wanted, failed), lambda one: (one.wanted.unit, one.shared)):
            for group in _groups(alike, self.low_memory):
                try:
                    yield from self._sample_or_split(group, partial(_tell, on_step, made))
                except ControlNetError as error:
                    for name in dict.fromkeys(one.wanted.name for one in group):
                        failed(name, error)
                made += len(group)

    def images(self, job: Job) -> Iterator[Image]:
        """Yield the images of one job, in the order of their seeds. Raises ControlNetError for what is wrong with
        it."""
        check_names(job)
        seeded = job.seeded()
        first = seeded.seed or 0
        yield from self.make([Wanted("", seeded, seed, None) for seed in range(first, first + job.num)])

    def _sample_or_split(self, group: list[Prepared], on_step: Callable[[float], None]) -> Iterator[Image]:
        """The images of a group; if memory runs out, those that are left one by one. Raises ModelError if one image
        alone is too much."""
        done = 0
        try:
            for image in self._sample(group, on_step):
                yield image
                done += 1
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(group) == 1:
                width, height = group[0].job.size or (0, 0)
                raise ModelError(
                    f"out of memory at {width}x{height} in {self.dtype}", "--low-memory, or a smaller --size"
                ) from error
        torch.cuda.empty_cache()
        self.talk.warn(f"out of memory for {len(group)} images at once; they are made one by one")
        for one in group[done:]:
            yield from self._sample_or_split([one], on_step)

    def _sample(self, group: list[Prepared], on_step: Callable[[float], None]) -> Iterator[Image]:
        first, job = group[0], group[0].job
        assert job.size is not None
        tile = tile_of(job, first.base)
        images = self._pass(
            first, [one.request for one in group], first.acting, job.size, job.strength_or_default,
            partial(_tell_part, on_step, 0.0, 1.0 if job.larger is None else 0.5),
            tile if job.larger is None else None,
        )  # fmt: skip
        if job.larger is not None and job.hires_strength is not None:
            requests = [one.request_of(image, job.larger) for one, image in zip(group, images, strict=True)]
            images = self._pass(
                first, requests, first.larger, job.larger, job.hires_strength,
                partial(_tell_part, on_step, len(group) / 2, 0.5), tile,
            )  # fmt: skip
        for place, (one, pixels) in enumerate(zip(group, images, strict=True)):
            pixels = pixels if one.painting is None else one.painting.laid_over(pixels)
            yield Image(one.wanted, pixels, one.record | {"batch": len(group), "place": place})

    def _pass(
        self,
        first: Prepared,
        requests: list[Request],
        acting: list[ActiveCondition],
        size: tuple[int, int],
        strength: float,
        on_step: Callable[[float], None],
        tile: int | None,
    ) -> Iterator[np.ndarray]:
        """An image (H, W, 3) uint8 on a canvas for each request; they agree with `first` in everything else."""
        job = first.job
        seen = (min(size[0], tile), min(size[1], tile)) if tile else size  # of the canvas at once
        return generate(
            first.base,
            requests,
            [(one.net, one.strength) for one in acting],
            size,
            job.steps,
            job.guidance,
            job.scheduler,
            on_step,
            first.encoded,
            batch=TOGETHER,
            clip_skip=job.clip_skip,
            ids=first.base.size_ids(seen, job.original_size, job.crop or (0, 0), job.target_size),
            strength=strength,
            emphasis=not job.plain_prompt,
            tile=tile,
        )

    def _prepare(self, wanted: list[Wanted], failed: Callable[[str, ControlNetError], None]) -> Iterator[Prepared]:
        bad = None
        for one in wanted:
            if one.job is bad:  # its other images would fail as the first one did
                continue
            try:
                prepared = self._prepared(one)
            except ControlNetError as error:
                bad = one.job
                failed(one.name, error)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                bad = one.job
                failed(one.name, ModelError(f"out of memory for its models in {self.dtype}", "--low-memory"))
            else:
                yield prepared

    def _prepared(self, one: Wanted) -> Prepared:
        # Checked, and what is worth knowing said, before anything is computed.
        base, encoded = self.base_for(one.job)
        scheduler = make_scheduler(base.scheduler, one.job.scheduler)
        size, conditions = self.conditions(one.job)
        self.talk.of(one, size, base)
        tile = tile_of(one.job, base)
        check_memory(base, size, self.low_memory, None if one.job.hires else tile)
        evaluations = count_evaluations(scheduler, one.job.steps, one.job.strength_or_default if one.job.init else 1.0)

        # The conditions on the canvas, each with its ControlNet.
        job = one.job.settled(base, size)
        acting = [self._acting(job, flag, map_, base) for flag, map_ in zip(job.cond, conditions, strict=True)]
        for flag, at_work in zip(job.cond, acting, strict=True):
            check_window(flag, at_work.strength, evaluations)

        larger = []
        if job.larger is not None and job.hires_strength is not None:
            check_memory(base, job.larger, self.low_memory, tile)
            at = replace(job, size=job.larger)
            larger = [self._acting(at, flag, map_, base) for flag, map_ in zip(job.cond, conditions, strict=True)]
            again = count_evaluations(scheduler, job.steps, job.hires_strength)
            for flag, at_work in zip(job.cond, larger, strict=True):
                if not at_work.strength.acts_in(again):
                    self.pictures.warn(f"--cond {flag.path}: acts in none of the {again} evaluations of --hires")

        # The picture to start from, and the part of it that is painted.
        init, init_hash = self.pictures.start(job.init, size) if job.init else (None, None)
        painting, mask = self.pictures.painting(job), None
        if painting is not None:
            init, mask = self.pictures.painted(painting, size)

        # What is recorded, and what images made together must share.
        entries = [at_work.entry for at_work in acting]
        acts = [{key: value for key, value in entry.items() if key in ("net", "kind", *ACTS)} for entry in entries]
        record = job.record() | {
            "scheduler": job.scheduler or type(scheduler).__name__,
            "sampler": job.scheduler or name_of(scheduler),
            "base_sha256": model_hash(base.path),
            "vae_sha256": model_hash(base.vae_path) if base.vae_path else None,
            "conditions": entries,
            "adapters_sha256": [model_hash(self.sources.adapter(*one)) for one in job.adapters],
            "init_sha256": init_hash,
            "mask_sha256": None if painting is None else painting.mask_sha256,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "low_memory": self.low_memory,
            "engine": base.engine.name,
            "seed": one.seed,
        }
        regions = [None if (r := one.strength.region) is None else sha256(r.tobytes()) for one in (*acting, *larger)]
        texts = (job.prompt, job.negative, job.prompt2, job.negative2)
        lengths = None if job.plain_prompt else [base.count_chunks(text or "") for text in texts]
        shared = job.shared() + json.dumps([acts, job.mask is None, regions, lengths], sort_keys=True)
        return Prepared(one, job, base, encoded, acting, init, mask, painting, shared, record, larger)

    def _acting(self, job: Job, flag: ConditionFlag, condition: Condition, base: Base) -> ActiveCondition:
        assert job.size is not None
        source = self.sources.source(job.base, flag, condition.kind)
        net, net_hash = self.models.net(job.base, whole_path(source))
        known = NETS.get(flag.net or "")
        if known is not None and not any(stands_in(condition.kind, kind) for kind in known.kinds):
            self.pictures.warn(f"{flag.path}: is a {condition.kind} map, and {flag.net} is for {known.kind}")
        painting = self.pictures.painting(job)
        if kind_named(condition.kind).hides:
            map_ = self.pictures.hiding(flag, condition, job.size, painting)
        else:
            map_ = self.pictures.placed(flag, condition, job.size)
        weighting = job.weighting_of(flag)
        region, region_hash = self._region(flag, painting, job)
        region_entry = {"region": flag.region, "region_sha256": region_hash} if flag.region else {}
        on = "cond" if net.averages else job.control_on
        strength = Strength(flag.scale, flag.start, flag.end, weighting, on, region)
        scale = scale_text(flag.scale) if isinstance(flag.scale, tuple) else flag.scale
        acts = {"scale": scale, "start": flag.start, "end": flag.end, "weighting": weighting_text(weighting)}
        box = self._box(flag, job, job.size, painting) if job.size else None
        entry = self._origin(flag, condition) | acts | region_entry
        entry |= {"box": [float(side) for side in box]} if box not in (None, WHOLE) else {}
        entry |= {"kind": condition.kind, "net": recorded_name(source), "net_sha256": net_hash}
        entry["map_sha256"] = sha256(map_.tobytes())
        return ActiveCondition(net, strength, map_, entry)

    def _box(self, flag: ConditionFlag, job: Job, size: tuple[int, int], painting: Painting | None) -> Box | None:
        """The part of a condition that the canvas shows: of the photo to start from as much as it shows of that."""
        if painting is not None:
            return painting.box if job.region_only or flag.path == job.init else None
        if flag.path != job.init or flag.detect is not None:  # a detector cuts its photo itself
            return None
        photo = self.pictures.picture(flag.path)[0]
        left, top, width, height, _ = window((photo.shape[1], photo.shape[0]), size, "crop")
        return left, top, left + width, top + height

    def _region(self, flag: ConditionFlag, painting: Painting | None, job: Job) -> tuple[np.ndarray | None, str]:
        """Where a condition acts, (H, W) on the canvas, and the sha256 of its file."""
        assert job.size is not None
        if flag.region in (PAINTED, REST) and painting is not None:
            return self.pictures.part(painting, flag.region == REST, job.size), painting.mask_sha256
        if flag.region is None:
            return None, ""
        box = painting.box if painting and job.region_only else None
        return self.pictures.region(whole_path(flag.region), job.size, box)

    def _origin(self, flag: ConditionFlag, condition: Condition) -> dict[str, Any]:
        """Where a condition comes from: its file, how it was detected, and the people on it."""
        _, _, digest = self.pictures.picture(flag.path)
        entry: dict[str, Any] = {"path": flag.path, "sha256": digest}
        if flag.detect is None:
            return entry | ({"keypoints": condition.record["keypoints"]} if condition.people is not None else {})
        found = {key: value for key, value in condition.record.items() if key not in MAKING}
        return entry | {"detect": {key: condition.record[key] for key in MAKING}} | found

    def shown(self, image: Image) -> np.ndarray:
        """The part of an image that its canvas shows."""
        job = image.wanted.job
        painting = self.pictures.painting(job)
        return inside(image.pixels, painting.box if painting else None)

    def base_for(self, job: Job) -> tuple[Base, Encoded]:
        """The base of a job. Checks first that all its models are here or may be fetched, and that they fit
        together."""
        if self.offline:
            self.sources.check_here(job, self.pictures.kind)
        self.sources.check(job, self.pictures.kind)
        return self.models.adapted(job.base, job.vae and whole_path(job.vae), job.lora, job.embedding)

    def conditions(self, job: Job) -> tuple[tuple[int, int], list[Condition]]:
        """The canvas of a job (width, height), and its conditions: as read, or detected at the canvas's aspect."""
        base, _ = self.base_for(job)
        size = job.size
        painting = self.pictures.painting(job)
        if size is None:
            first = self.pictures.picture(job.shown)[0] if job.shown else None
            shown = (first.shape[1], first.shape[0]) if first is not None else None
            size = canvas_size(base, painting.size if painting else shown, own_aspect=painting is not None)
            if job.tiles and job.hires is None and job.init and not job.region_only and shown is not None:
                own = own_size(base, shown)
                size = own if min(own) >= min(size) else size  # a large photo in tiles keeps its size
        if painting is not None:
            painting.check_canvas(size, str(job.init))
        found = []
        for flag in job.cond:
            box = self._box(flag, job, size, painting)
            found.append(self.pictures.condition(flag, size if flag.detect else None, box))
        return size, found


def tile_of(job: Job, base: Base) -> int | None:
    """The side in pixels of a job's tiles; None if it wants none."""
    return base.native_size if job.tiles else None


def _tell_part(on_step: Callable[[float], None], before: float, part: float, images: float) -> None:
    on_step(before + part * images)


def _groups(alike: Iterator[Prepared], low_memory: bool) -> Iterator[list[Prepared]]:
    """As many as are sampled together, of some that may be."""
    for first in alike:
        more = 0 if low_memory or first.base.engine.alone else TOGETHER - 1
        yield [first, *islice(alike, more)]


def _tell(on_step: Callable[[float], None], before: int, images: float) -> None:
    on_step(before + images)
