"""Where the models of a job come from (tables, folders, files, hub ids), and which of them are missing here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlnet.model.work.condition import ConditionFlag, check_kind, check_weighting
from controlnet.model.work.jobs import Job
from controlnet.model.work.named import no_net
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.files import exists

if TYPE_CHECKING:
    from controlnet.model.files.stored import Stored


class Sources:
    """Finds the models of jobs. Equal questions are answered once."""

    def __init__(self, offline: bool):
        self.offline = offline
        self.source = cache(self._source)
        self.base = cache(self._base)
        self.check = lru_cache(1024)(self._check)
        self.fits = cache(self._fits)
        self._checked: set[Job] = set()

    def _source(self, base_name: str, flag: ConditionFlag, kind: str) -> str:
        """The folder, file or hub id of a condition's ControlNet: its own, or the table's for the base's family."""
        from controlnet.model.registry import NETS, net_for

        if flag.net:
            return NETS[flag.net].source if flag.net in NETS and not exists(flag.net) else flag.net
        family = self._family(base_name)
        if net := net_for(family, kind):
            return net.source
        raise no_net(flag.path, kind, base_name, family)

    def _family(self, base_name: str) -> str:
        from controlnet.model.files.families import family_name
        from controlnet.model.registry import BASES

        if base_name in BASES:
            return BASES[base_name].family
        return family_name(self.base(base_name).config("unet"))

    def missing(self, job: Job, kind_of: Callable[[ConditionFlag], str]) -> list[tuple[str, str]]:
        """(name to pull, what it is) of all that a job needs and this machine lacks."""
        from controlnet.model.files import hub
        from controlnet.model.registry import BASES, NETS
        from controlnet.preprocessors.detectors.registry import find_detector
        from controlnet.preprocessors.weights import kept

        lacking = {}
        base = BASES[job.base].source if job.base in BASES else job.base
        absent = hub.is_hub_id(base) and not exists(base) and not hub.kept(base)
        if absent:
            lacking[job.base] = f"base {job.base}"
        if job.vae and hub.is_hub_id(job.vae) and not exists(job.vae) and not hub.kept(job.vae):
            lacking[job.vae] = f"VAE {job.vae}"
        for what, source in job.adapters:
            if hub.is_hub_id(source) and not exists(source) and not hub.kept(source):
                lacking[source] = f"{what} {source}"
        for flag in job.cond:
            kind = flag.kind or flag.detect or ""
            for weights in find_detector(flag.detect).weights if flag.detect else ():
                if not kept(weights):
                    lacking[weights] = f"detector's weights {weights}"
            if not flag.net and absent and job.base not in BASES:
                continue  # nobody knows yet which ControlNet would fit
            source = self.source(job.base, flag, kind or kind_of(flag))
            if hub.is_hub_id(source) and not exists(source) and not hub.kept(source):
                name = next((name for name, net in NETS.items() if net.source == source), source)
                lacking[name] = f"ControlNet {name}"
        return list(lacking.items())

    def check_here(self, job: Job, kind_of: Callable[[ConditionFlag], str]) -> None:
        """Raises ModelError that lists all that a job needs and this machine lacks."""
        if job in self._checked:
            return
        if lacking := self.missing(job, kind_of):
            raise ModelError(
                f"not on this machine, and --offline is given: {', '.join(what for _, what in lacking)}",
                f"with a network: controlnet models pull {' '.join(name for name, _ in lacking)}",
            )
        self._checked.add(job)

    def find(self, source: str) -> Path:
        """A ControlNet's folder or file, fetched if it is not here and may be."""
        from controlnet.model.files.hub import find

        return find(source, self.offline, "--cond map.png,net=FOLDER")

    def adapter(self, what: str, source: str) -> Path:
        """The folder or file of a `lora` or an `embedding`, fetched if it is not here and may be."""
        from controlnet.model.files.hub import find

        return find(source, self.offline, f"--{what} FILE")

    def _base(self, name: str) -> Stored:
        """A base on disk, of which no weights are read."""
        from controlnet.model.load import find_base

        return find_base(name, self.offline)

    def _fits(self, base_name: str, source: str) -> dict[str, Any]:
        """The config of a ControlNet. Raises ModelError when it is made for another family of bases, before weights are
        read."""
        from controlnet.model.files.layouts import open_model
        from controlnet.model.nets import check_family

        stored = open_model(self.find(source))
        check_family(stored, self.base(base_name).config("unet"), base_name)
        return stored.config("controlnet")

    def _check(self, job: Job, kind_of: Callable[[ConditionFlag], str]) -> None:
        """Check a job against the configs of its models, before any of them is loaded. Raises ModelError for models
        that do not fit together, UsageError for options that they do not have."""
        from controlnet.model.files.stored import UNION_CLASS
        from controlnet.model.nets import connections_of
        from controlnet.model.registry import recorded_name

        check_options(self.base(job.base), job)
        for what, source in job.adapters:
            self.adapter(what, source)
        for flag in job.cond:
            kind = kind_of(flag)
            source = self.source(job.base, flag, kind)
            config = self.fits(job.base, source)
            types = config["num_control_type"] if config["_class_name"] == UNION_CLASS else None
            check_kind(flag, kind, recorded_name(source), types)
            check_weighting(flag, job.weighting_of(flag), connections_of(config))


def check_options(base: Stored, job: Job) -> None:
    """Raises UsageError for options that a base does not have."""
    from controlnet.model.base import inpainting_channels
    from controlnet.model.files.families import family_of_config

    unet = base.config("unet")
    family = family_of_config(unet)
    if unet.get("in_channels") == inpainting_channels(unet.get("out_channels", 4)) and job.mask is None:
        raise UsageError(f"base {job.base} is made for inpainting: no --mask", "--init photo.jpg --mask mask.png")
    for flag in ("original_size", "crop", "target_size"):
        if getattr(job, flag) is not None and not unet.get("addition_embed_type"):
            raise UsageError(f"--{flag.replace('_', '-')}: base {job.base} is not told of sizes", "--base sdxl")
    for flag in ("prompt2", "negative2"):
        if getattr(job, flag) is not None and len(family.encoders) == 1:
            raise UsageError(f"--{flag}: base {job.base} has one text encoder", "--base sdxl, or --prompt alone")
    if job.negative2 is not None and job.negative is None and base.none_is_zeros:
        raise UsageError("--negative2: without --negative, both encoders' features are zeros", '--negative ""')
    for encoder in family.encoders:
        count = base.config(encoder.part).get("num_hidden_layers", 12)
        if not isinstance(count, int):
            raise ModelError(f"{base.path}: num_hidden_layers of its {encoder.part} is {count!r}, expected a number")
        if job.clip_skip >= (layers := count - encoder.skipped):
            raise UsageError(f"--clip-skip {job.clip_skip}: the text encoder has {layers} layers", "--clip-skip 1")
