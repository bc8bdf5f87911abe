"""Stage two for many jobs: conditions read, each model loaded once, images of equal settings made together, written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlnet.cli.conditions import ConditionFlag, scale_text, weighting_text
from controlnet.cli.jobs import Job, Wanted
from controlnet.cli.machine import choose_device, choose_dtype, silence_libraries
from controlnet.cli.options import say, warn
from controlnet.cli.sources import Sources
from controlnet.preprocessors.errors import ControlNetError, InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from controlnet.model.base import Base
    from controlnet.model.control.strength import Strength
    from controlnet.model.sampling.generate import Memory, Request


@dataclass(frozen=True, eq=False)
class Read:
    """A condition as it was read: its kind, the map (H, W, 3) uint8, and the record of where it came from."""

    kind: str
    map: np.ndarray
    record: dict
    made: dict
    """What the map's PNG text says of its making."""


@dataclass
class Setup:
    """All that images made together share: the base, the ControlNets with their strengths, the sampling."""

    base: Base
    memory: Memory
    nets: list[tuple[Any, Strength]]
    size: tuple[int, int]
    steps: int
    guidance: float
    scheduler: str | None


@dataclass
class Prepared:
    """A wanted image with all that it is made from. Images of equal `shared` are sampled together."""

    wanted: Wanted
    shared: str
    setup: Setup
    request: Request
    record: dict


class Studio:
    """Loads every base and ControlNet once, reads conditions, and makes images."""

    def __init__(self, device: str | None, dtype: str | None, offline: bool, strict: bool, low_memory: bool = False):
        silence_libraries()
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.offline, self.strict, self.low_memory = offline, strict, low_memory
        # Each is made once for equal arguments. A few conditions are kept: jobs next to each other often share one.
        self.base = cache(self._base)
        self.net = cache(self._net)
        self.sources = Sources(offline)
        self.detector = cache(self._detector)
        self.kind = lru_cache(64)(self._kind)
        self.read = lru_cache(8)(self._read)
        self.picture = lru_cache(8)(self._picture)
        self.placed = lru_cache(8)(self._placed)
        self.region = lru_cache(8)(self._region)
        self.told: set[str] = set()

    def make(self, wanted: list[Wanted], failed: Callable[[str, ControlNetError], None],
             on_step: Callable[[float], None]) -> Iterator[tuple[Wanted, bytes, dict]]:  # fmt: skip
        """(wanted, PNG, record) of one image after another. What fails is reported and the rest goes on."""
        from controlnet.model.sampling.generate import BATCH, generate

        made = 0
        together = 1 if self.low_memory else BATCH
        for _, alike in groupby(self._prepare(wanted, failed), lambda one: one.shared):
            while group := list(islice(alike, together)):
                setup, requests = group[0].setup, [one.request for one in group]
                try:
                    images = generate(
                        setup.base, requests, setup.nets, setup.size, setup.steps, setup.guidance, setup.scheduler,
                        partial(_tell_step, on_step, made), setup.memory,
                    )  # fmt: skip
                    for place, (one, image) in enumerate(zip(group, images, strict=True)):
                        yield one.wanted, *_png(image, one.record | {"batch": len(group), "place": place})
                except ControlNetError as error:
                    for name in dict.fromkeys(one.wanted.name for one in group):
                        failed(name, error)
                made += len(group)

    def _prepare(self, wanted: list[Wanted], failed: Callable[[str, ControlNetError], None]) -> Iterator[Prepared]:
        bad = None
        for one in wanted:
            if one.job is bad:  # its other images would fail as the first one did
                continue
            try:
                yield self._prepared(one)
            except ControlNetError as error:
                bad = one.job
                failed(one.name, error)

    def _prepared(self, one: Wanted) -> Prepared:
        import torch
        from controlnet.model.files.hashes import model_hash
        from controlnet.model.sampling.generate import Request, check_memory
        from controlnet.model.sampling.loop import count_evaluations
        from controlnet.model.sampling.schedulers import make_scheduler

        job = one.job
        base, memory = self.base_for(job)
        own = make_scheduler(base.scheduler, job.scheduler)
        size, reads = self.reads(job)
        self._say_canvas(one, size)
        self._check_words(base, job)
        check_memory(base, size, self.low_memory)
        evaluations = count_evaluations(own, job.steps)
        acting = [self._acting(job, flag, read, base, size) for flag, read in zip(job.cond, reads, strict=True)]
        for flag, (_, strength, _, _) in zip(job.cond, acting, strict=True):
            strength.check_window(evaluations, f"--cond {flag.path}")
        guidance = base.guidance if job.guidance is None else job.guidance
        control_on = job.acts_on or base.control_on
        conditions = [fields for _, _, _, fields in acting]
        record = {
            "prompt": job.prompt, "negative": job.negative, "steps": job.steps, "guidance": guidance,
            "size": list(size), "scheduler": job.scheduler or type(own).__name__, "base": job.base,
            "base_sha256": model_hash(base.path), "control_on": control_on,
            "conditions": conditions, "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."), "versions": _versions(),
            "threads": torch.get_num_threads(), "low_memory": self.low_memory, "seed": one.seed,
        }  # fmt: skip
        nets = [(net, strength) for net, strength, _, _ in acting]
        request = Request(job.prompt, one.seed, tuple(map_ for _, _, map_, _ in acting), job.negative)
        setup = Setup(base, memory, nets, size, job.steps, guidance, job.scheduler)
        acts = [{k: v for k, v in fields.items() if k in ("net", *_ACTS)} for fields in conditions]
        shared = json.dumps([job.base, size, job.steps, guidance, job.scheduler, control_on, acts], sort_keys=True)
        return Prepared(one, shared, setup, request, record)

    def _acting(self, job: Job, flag: ConditionFlag, read: Read, base: Base, size: tuple[int, int]):
        """A condition at work: (ControlNet, Strength, map on the canvas, record)."""
        from controlnet.model.control.strength import Strength
        from controlnet.preprocessors.metadata import sha256

        source = self.sources.source(job.base, flag, read.kind)
        net, net_hash = self.net(base.name, source)
        map_ = self.placed(flag, read, size)
        weighting = job.weighting_of(flag)
        region, region_record = self.region(flag.region, size) if flag.region else (None, {})
        strength = Strength(flag.scale, flag.start, flag.end, weighting, job.acts_on, region)
        strength.check(net, f"--cond {flag.path}")
        scale = scale_text(flag.scale) if isinstance(flag.scale, tuple) else flag.scale
        acts = {"scale": scale, "start": flag.start, "end": flag.end, "weighting": weighting_text(weighting)}
        fields = read.record | acts | region_record
        fields |= {"kind": read.kind, "net": source, "net_sha256": net_hash, "map_sha256": sha256(map_.tobytes())}
        return net, strength, map_, fields

    def base_for(self, job: Job) -> tuple[Base, Memory]:
        """The base of a job, once it is known that all its models are here, or may be fetched, and fit together."""
        if self.offline:
            self.sources.check_here(job, self.kind)
        for flag in job.cond:
            self.sources.fits(job.base, self.sources.source(job.base, flag, self.kind(flag)))
        return self.base(job.base)

    def reads(self, job: Job) -> tuple[tuple[int, int], list[Read]]:
        """The canvas of a job, and its conditions as they were read, or detected at the canvas's aspect."""
        from controlnet.model.sampling.generate import canvas_size

        base, _ = self.base_for(job)
        size = job.size
        if size is None:
            first = self.read(job.cond[0]) if job.cond and job.cond[0].detect is None else None
            if first is not None:
                height, width = first.map.shape[:2]
                size = canvas_size(base, (width, height))
            else:
                size = canvas_size(base, self._photo_size(job.cond[0].path) if job.cond else None)
        return size, [self.read(flag, size) if flag.detect else self.read(flag) for flag in job.cond]

    def _photo_size(self, path: str) -> tuple[int, int]:
        image, _ = self.picture(path)
        return image.shape[1], image.shape[0]

    def _picture(self, path: str):
        """(image, (its PNG text, its bytes' sha256)) of a picture file."""
        from controlnet.preprocessors.images import read_bytes, read_image
        from controlnet.preprocessors.metadata import sha256

        data = read_bytes(path)
        image, text = read_image(data, path, warn)
        return image, (text, sha256(data))

    def _kind(self, flag: ConditionFlag) -> str:
        """The kind of a condition: of one that is to be detected as the flag says, else as `_kind_of`."""
        if flag.detect is not None:
            return flag.kind or flag.detect
        return _kind_of(flag, self.picture(flag.path)[1][0])

    def _base(self, name: str) -> tuple[Base, Memory]:
        from controlnet.model.base import load_base
        from controlnet.model.sampling.generate import Memory

        base = load_base(name, self.device, self.dtype, self.offline, self.low_memory)
        dtype = str(self.dtype).removeprefix("torch.")
        say(f"base {name} on {self.device} in {dtype}; no safety checker runs")
        return base, Memory()

    def _net(self, base_name: str, source: str):
        """A ControlNet that fits the base, and its hash."""
        from controlnet.model.files.hashes import model_hash
        from controlnet.model.nets import load_controlnet

        base, _ = self.base(base_name)
        path = self.sources.find(source)
        net = load_controlnet(path, base.dtype, base.unet.config, base.name)
        net = net if self.low_memory else net.to(base.device)
        return net, model_hash(path)

    def _detector(self, kind: str):
        from controlnet.preprocessors.detectors.registry import find_detector

        row = find_detector(kind)
        options = row.load_options()()
        return row, options, row.ready(options, offline=self.offline)

    def _read(self, flag: ConditionFlag, canvas: tuple[int, int] | None = None) -> Read:
        """The map of a condition; stage one, for a canvas (width, height), where `detect` asks for it."""
        from controlnet.model.sampling.generate import detection_size
        from controlnet.preprocessors.metadata import load
        from controlnet.preprocessors.stage_one import detect, record, rgb

        image, (text, digest) = self.picture(flag.path)
        fields: dict[str, Any] = {"path": flag.path, "sha256": digest}
        if flag.detect is None:
            kind = self.kind(flag)
            if kind == "pose" and (keypoints := load(text).get("keypoints")) is not None:
                fields["keypoints"] = keypoints
            return Read(kind, image, fields, load(text))
        assert canvas is not None
        detector, options, make = self.detector(flag.detect)
        size = detection_size(canvas)
        map_, found = detect(image, make, size, "crop")
        fields |= {"detect": record(detector, options, size, "crop", flag.path, digest)} | found
        return Read(self.kind(flag), rgb(map_), fields, fields["detect"] | found)

    def _placed(self, flag: ConditionFlag, read: Read, size: tuple[int, int]) -> np.ndarray:
        """The condition's map on the canvas; what looks wrong with it is said, or an error when strict."""
        from controlnet.model.sampling.canvas import to_canvas
        from controlnet.preprocessors.doubts import doubts
        from controlnet.preprocessors.skeleton import from_text

        for doubt in doubts(read.map, read.kind, size):
            if self.strict:
                raise InputError(f"{flag.path}: {doubt.text}", doubt.cure)
            warn(f"{flag.path}: {doubt.text}; {doubt.cure}")
        return to_canvas(read.map, read.kind, size, from_text(read.record, flag.path))

    def _region(self, path: str, size: tuple[int, int]) -> tuple[np.ndarray, dict]:
        """(H, W) float32 in [0, 1] on the canvas, and its record."""
        import numpy as np
        from controlnet.model.sampling.canvas import to_canvas

        image, (_, digest) = self.picture(path)
        if (image.shape[1], image.shape[0]) != size:
            say(f"{path}: region of {image.shape[1]}x{image.shape[0]} brought to the canvas {size[0]}x{size[1]}")
        mask = to_canvas(image, "region", size).mean(2, dtype=np.float32) / 255
        if not mask.any():
            warn(f"{path}: the region is black everywhere, so its ControlNet does not act")
        return mask, {"region": path, "region_sha256": digest}

    def _say_canvas(self, one: Wanted, size: tuple[int, int]) -> None:
        """Once for a job that stands alone, with its seeds; once for each size of many jobs."""
        said = f"canvas {size[0]}x{size[1]}"
        if not one.name and one.job.seed is not None:
            last = one.job.seed + one.job.num - 1
            said += f", seed {last}" if one.job.num == 1 else f", seeds {one.job.seed} to {last}"
        if said not in self.told:
            self.told.add(said)
            say(said)

    def _check_words(self, base: Base, job: Job) -> None:
        for text in filter(None, (job.prompt, job.negative)):
            if text in self.told:
                continue
            self.told.add(text)
            if cut := base.cut_words(text):
                warn(f"the text encoder reads {base.max_tokens - 2} tokens; these words are beyond: {cut}")
            if unknown := base.unknown_words(text):
                warn(f"{job.base} never met these words in training: {', '.join(unknown)}")


def _tell_step(on_step: Callable[[float], None], before: int, images: float) -> None:
    on_step(before + images)


_ACTS = ("scale", "start", "end", "weighting", "region", "region_sha256")
"""What a condition's record says of how it acts."""


def _kind_of(flag: ConditionFlag, text: dict[str, str]) -> str:
    """As given, or told by the map's text or name; or by the training run that made its net. With another net of one's
    own it may be any."""
    from controlnet.preprocessors.files import is_file
    from controlnet.preprocessors.jsons import object_or_empty
    from controlnet.preprocessors.metadata import kind_of

    run = Path(flag.net) / "run.json" if flag.net else None
    settings = object_or_empty(run.read_bytes()).get("settings") if run and is_file(run) else None
    trained = settings.get("kind") if isinstance(settings, dict) else None
    try:
        return kind_of(flag.path, text, flag.kind)
    except UsageError:
        if flag.net:
            return trained or "own"
        raise


def _png(image: np.ndarray, made: dict) -> tuple[bytes, dict]:
    """The PNG with our JSON and the `parameters` line that other tools read in its text; and the record."""
    from controlnet.preprocessors.images import png_bytes
    from controlnet.preprocessors.metadata import dump

    size = "x".join(map(str, made["size"]))
    lines = [made["prompt"], f"Negative prompt: {made['negative']}" if made["negative"] else ""]
    settings = f"Steps: {made['steps']}, Sampler: {made['scheduler']}, CFG scale: {made['guidance']:g}, "
    settings += f"Seed: {made['seed']}, Size: {size}, Model: {made['base']}"
    nets = "".join(f", ControlNet {i}: {c['kind']} weight {c['scale']}" for i, c in enumerate(made["conditions"]))
    text = {**dump(made), "parameters": "\n".join(line for line in (*lines, settings + nets) if line)}
    return png_bytes(image, text), made


@cache
def _versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers
    from controlnet.preprocessors.stage_one import version

    return {
        "controlnet": version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
