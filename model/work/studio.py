"""Stage two for many jobs: conditions read, each model loaded once, images of equal settings made together.

for image in Studio().images(Job("map.canny.png", "a red cube", num=2)):
    Path(f"{image.record['seed']}.png").write_bytes(image.png())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from controlnet.model.base import Base, maps_weights
from controlnet.model.control.strength import Strength
from controlnet.model.emphasis import plain
from controlnet.model.engines.choose import engine_name, make_engine
from controlnet.model.engines.engine import Engine
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import has_vae, load_base, with_vae
from controlnet.model.nets import load_net
from controlnet.model.registry import recorded_name
from controlnet.model.sampling.canvas import canvas_size, own_size, trained_sizes
from controlnet.model.sampling.generate import Encoded, Request, generate
from controlnet.model.sampling.loop import count_evaluations
from controlnet.model.sampling.memory import check_memory
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.text import words_apart
from controlnet.model.work.adapted import adapted
from controlnet.model.work.batch import TOGETHER, Wanted
from controlnet.model.work.condition import (
    PAINTED,
    REST,
    ConditionFlag,
    check_window,
    scale_text,
    weighting_text,
)
from controlnet.model.work.jobs import Job, check_names
from controlnet.model.work.machine import (
    is_out_of_memory,
    keep_freed_memory,
    silence_libraries,
)
from controlnet.model.work.paint import Painting
from controlnet.model.work.pictures import Pictures
from controlnet.model.work.prepared import ActiveCondition, Image, Prepared, versions
from controlnet.model.work.sources import Sources
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.devices import choose_device, choose_dtype
from controlnet.preprocessors.errors import ControlNetError, ModelError
from controlnet.preprocessors.files import whole_path
from controlnet.preprocessors.geometry import Box, inside, window
from controlnet.preprocessors.kinds import kind_named
from controlnet.preprocessors.metadata import sha256
from controlnet.preprocessors.stage_one import MAKING
from torch import nn

FEW = 12
"""The most steps that suit a base that was distilled for few."""
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
        self.device = choose_device(device)
        if self.device.type == "cpu" and not low_memory:
            keep_freed_memory()
        self.dtype = choose_dtype(dtype, self.device)
        self.engine = engine
        self.made_engine = cache(partial(make_engine, say=say))
        if engine is not None:  # what is wrong with it comes out before anything is loaded
            self.made_engine(engine_name(engine, self.device, self.dtype, low_memory, 0))
        self.offline, self.strict, self.low_memory, self.say = offline, strict, low_memory, say
        # Each is made once for equal arguments. A few conditions are kept: jobs next to each other often share one.
        self.bases: dict[tuple[str, str | None], tuple[Base, Encoded]] = {}
        self.adapted = lru_cache(1 if self.device.type == "cuda" else 2)(self._adapted)
        self.net = cache(self._net)
        self.sources = Sources(offline)
        self.pictures = Pictures(offline, strict, say)
        self.told: set[str] = set()

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
        self._warn(f"out of memory for {len(group)} images at once; they are made one by one")
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
        self._say_canvas(one, size, base)
        self._say_distilled(one.job, base)
        self._check_words(base, one.job)
        tile = tile_of(one.job, base)
        check_memory(base, size, self.low_memory, None if one.job.hires else tile)
        evaluations = count_evaluations(scheduler, one.job.steps, one.job.strength_or_default if one.job.init else 1.0)

        # The conditions on the canvas, each with its ControlNet.
        job = one.job.settled(base, size)
        acting = [self._acting(job, flag, map_, base) for flag, map_ in zip(job.cond, conditions, strict=True)]
        for flag, at_work in zip(job.cond, acting, strict=True):
            check_window(flag, at_work.strength, evaluations)

        larger = []
        if job.larger is not None:
            check_memory(base, job.larger, self.low_memory, tile)
            at = replace(job, size=job.larger)
            larger = [self._acting(at, flag, map_, base) for flag, map_ in zip(job.cond, conditions, strict=True)]

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
        net, net_hash = self.net(job.base, whole_path(source))
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
        entry = self._origin(flag, condition) | acts | region_entry
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
        return self.adapted(job.base, job.vae and whole_path(job.vae), job.lora, job.embedding)

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

    def base(self, name: str, vae: str | None) -> tuple[Base, Encoded]:
        """A base that is loaded once."""
        if (name, vae) not in self.bases:
            self.bases[name, vae] = self._base(name, vae)
        return self.bases[name, vae]

    def _base(self, name: str, vae: str | None) -> tuple[Base, Encoded]:
        """A base, with another VAE if one is named: everything else of it is loaded once."""
        if vae is not None and has_vae(name, self.offline):
            base, encoded = self.base(name, None)
            return with_vae(base, vae, self.offline), encoded
        base = load_base(name, self.device, self.dtype, self.offline, self.low_memory, vae, self._engine_for)
        dtype = str(self.dtype).removeprefix("torch.")
        how = "" if base.engine.name == "eager" else f" by {base.engine.name}"
        self.say(f"base {name} on {self.device} in {dtype}{how}; no safety checker runs")
        return base, Encoded()

    def _engine_for(self, parameters: int) -> Engine:
        return self.made_engine(engine_name(self.engine, self.device, self.dtype, self.low_memory, parameters))

    def _adapted(
        self, name: str, vae: str | None, loras: tuple[str, ...], words: tuple[str, ...]
    ) -> tuple[Base, Encoded]:
        """A base under LoRAs and with learned words. What of each LoRA applies is said."""
        base, encoded = self.base(name, vae)
        if not (loras or words):
            return base, encoded
        under = adapted(base, loras, words, self.sources, self.say)
        if under.unet is not base.unet and self.engine is None and base.engine.alone:
            under.engine = self.made_engine("eager")  # each choice of LoRAs and scales would need a graph of its own
        return under, Encoded()

    def _plain_base(self, name: str) -> tuple[Base, Encoded]:
        """A loaded base of this name, whichever VAE it has."""
        return next((pair for (known, _), pair in self.bases.items() if known == name), None) or self.base(name, None)

    def _net(self, base_name: str, source: str) -> tuple[Any, str]:
        """A ControlNet that fits the base, and its hash."""
        base, _ = self._plain_base(base_name)
        path = self.sources.find(source)
        spare = maps_weights(self.low_memory, base.device, base.engine)
        net = load_net(path, base.dtype, base.unet.config, base.name, base.engine, spare)
        return net if self.low_memory else nn.Module.to(net, base.device), model_hash(path)

    def _say_distilled(self, job: Job, base: Base) -> None:
        """Warn of settings that do not suit a base that was distilled for few steps."""
        guidance = base.guidance if job.guidance is None else job.guidance
        if base.distilled and (job.steps > FEW or guidance > 2) and job.base not in self.told:
            self.told.add(job.base)
            self._warn(
                f"{job.base} seems to be made for few steps ({base.distilled}), and is asked for {job.steps} with"
                f" guidance {guidance:g}; try --steps 4 --guidance 1"
            )

    def _say_canvas(self, one: Wanted, size: tuple[int, int], base: Base) -> None:
        """Say the canvas: for a single job with its seeds, for many jobs once per size. Also say if the base was not
        trained on it."""
        said = f"canvas {size[0]}x{size[1]}"
        if not one.name and one.job.seed is not None:
            last = one.job.seed + one.job.num - 1
            said += f", seed {last}" if one.job.num == 1 else f", seeds {one.job.seed} to {last}"
        if said not in self.told:
            self.told.add(said)
            self.say(said)
            if (known := trained_sizes(base)) and size not in known:
                near = canvas_size(base, size)
                self.say(f"{base.name} was not trained on {size[0]}x{size[1]}; the nearest is {near[0]}x{near[1]}")

    def _check_words(self, base: Base, job: Job) -> None:
        said = " ".join(filter(None, (job.prompt, job.negative, job.prompt2, job.negative2)))
        for word in base.encoders[0].learned:
            if word not in words_apart(said.lower(), [word]) and word not in self.told:
                self.told.add(word)
                self._warn(f"the learned word {word!r} is in none of the prompts")
        for text in filter(None, (job.prompt, job.negative, job.prompt2, job.negative2)):
            if text in self.told:
                continue
            self.told.add(text)
            if not job.plain_prompt:
                text = plain(text)
            elif cut := base.cut_words(text):
                self._warn(f"the text encoder reads {base.max_tokens - 2} tokens; these words are beyond: {cut}")
            if unknown := base.unknown_words(text):
                self._warn(f"{job.base} never met these words in training: {', '.join(unknown)}")

    def _warn(self, text: str) -> None:
        self.say(f"warning: {text}")


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
