"""A job: what `generate` is asked for, and how its fields are read. Loads no model.

Each field of `Job` is a flag of the command and a key in a file of jobs; its docstring is the flag's help. By default
it is also an entry of an image's record, which `replay` reads, and only jobs with the same value are sampled together.
Not recorded are fields that no image depends on (out, num) and those that the conditions' entries repeat (cond, mode,
weighting). To add one: a field here, and its use in `studio.py`, which hands it on to `sampling/generate.py`."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from controlnet.model.control.modes import CONTROL_ON, MODES
from controlnet.model.work import options
from controlnet.model.work.condition import PAINTED, REST, ConditionFlag
from controlnet.model.work.outputs import IMAGES, is_folder
from controlnet.preprocessors import remote
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.kinds import KINDS
from controlnet.preprocessors.metadata import size_of
from controlnet.preprocessors.tars import member_of

INIT = "@init"
"""A condition's path that means the picture to start from."""
SAMPLE = "@sample"
"""A condition's path that means those of each sample, where jobs come from tar files."""
ALPHA = "@alpha"
"""A mask's path that means the transparency of the picture to start from."""
STRENGTH = 0.6
HIRES_STRENGTH = 0.5
MAX_NUM = 10_000
MAX_STEPS = 999  # schedulers with an offset of one step have no more


def _of_init(flag: ConditionFlag, init: str) -> ConditionFlag:
    return replace(flag, path=init) if flag.path == INIT else flag


@dataclass(frozen=True)
class Job:
    """One prompt with its conditions, for one or more images. Each field takes its value, or the text of its flag:
    `Job("map.canny.png,scale=0.8", "a red cube", size="768x512")`. Raises UsageError for what is wrong without a model.
    """

    cond: tuple[ConditionFlag, ...] = options.option(
        (),
        options.conditions,
        list[str],
        metavar="PATH[,...]",
        flag_default=None,
        recorded=False,
        shared=False,
    )
    """A condition map, or a folder of maps; repeat for several. Keys: detect=KIND, kind, net, scale, start, end,
    weighting, region."""
    prompt: str = options.option("", options.text, str, "-p", shared=False)
    """What the image shows; (word:1.2) counts more, [word] less; @FILE reads it from a file."""
    negative: str | None = options.option(None, options.text, shared=False)
    """What it should not show; or @FILE. (default: nothing, for SDXL the zeros that it was trained with)"""
    prompt2: str | None = options.option(None, options.text, shared=False)
    """What the second text encoder of SDXL reads. (default: the prompt)"""
    negative2: str | None = options.option(None, options.text, shared=False)
    """What it reads as the negative prompt. (default: the negative prompt)"""
    plain_prompt: bool = options.option(False, options.yes_or_no, bool)
    """Take brackets in the prompts as they are, and cut them at the text encoder's length. (default: (word:1.2) weighs
    more, [word] less, BREAK begins a new chunk, and prompts are as long as you like)"""
    clip_skip: int = options.option(0, options.whole, int)
    """How many layers to leave out at the end of the text encoders, for both prompts (A1111's number minus 1)."""
    out: str | None = options.option(None, options.text, str, "-o", recorded=False, shared=False)
    """Where the result goes: a .png, .jpg or .webp; a folder (any other name); or - for standard output."""
    num: int = options.option(1, options.whole, int, "-n", recorded=False, shared=False)
    """How many images; image k uses seed + k."""
    steps: int = options.option(20, options.whole, int)
    """Sampling steps."""
    guidance: float | None = options.option(None, options.number, float)
    """Classifier-free guidance scale; 1 turns it off. (default: the base's)"""
    scheduler: str | None = options.option(None, options.text)
    """ddim, euler, unipc, ... (default: the base's)"""
    base: str = options.option("tiny", options.text, flag_default=None)
    """The text-to-image model: a name of `models list`, a folder in diffusers' layout, a single file, or a hub id.
    (default: what $CONTROLNET_BASE says, or `models use` said, or tiny)"""
    vae: str | None = options.option(None, options.text)
    """Another VAE than the base's own: a folder, a single file, or a hub id."""
    lora: tuple[str, ...] = options.option((), options.loras, list[str], metavar="FILE[:scale]", flag_default=None)
    """A LoRA on the base: a file, a folder or a hub id, with a scale (default: 1); repeat for several."""
    embedding: tuple[str, ...] = options.option(
        (), options.embeddings, list[str], metavar="FILE[:word]", flag_default=None
    )
    """A word that was learned (textual inversion); repeat for several. (default word: the file's own, or its name)"""
    size: tuple[int, int] | None = options.option(None, options.size)
    """Canvas, WIDTHxHEIGHT or one number. (default: the condition's aspect at the base's native size)"""
    init: str | None = options.option(None, options.text, shared=False)
    """A picture to start from, or a folder of them; `--cond @init,...` makes a condition of it."""
    strength: float | None = options.option(None, options.number, float)
    """How much of the sampling is made on it: 0.1 keeps nearly all of it, 1 hardly anything. (default: 0.6; 1
    where there is a mask)"""
    mask: str | None = options.option(None, options.text, shared=False)
    """A picture that is white where the one to start from is made anew, grey in part; what is black stays, byte for
    byte. @alpha: where it is transparent."""
    invert_mask: bool = options.option(False, options.yes_or_no, bool)
    """Make anew what is black in the mask."""
    feather: int = options.option(0, options.whole, int)
    """Width in pixels over which the new goes over into the old, inside of the mask."""
    region_only: bool = options.option(False, options.yes_or_no, bool)
    """Work on the mask's surroundings alone, at the base's own size, and lay the result over the photo: for small parts
    of large photos."""
    hires: float | None = options.option(None, options.factor, str, metavar="2x")
    """Make the image so many times as large: sampled again from itself, enlarged, under the same conditions. With a
    mask its size stays the photo's, and what is made anew is finer."""
    hires_strength: float | None = options.option(None, options.number, float)
    """How much of the sampling is made for that; see --strength. (default: 0.5)"""
    tiles: bool = options.option(False, options.yes_or_no, bool)
    """Sample a canvas larger than the base's own in tiles that overlap, with the memory of one: with --hires the second
    pass, else the only one, such as of a large --init."""
    original_size: tuple[int, int] | None = options.option(None, options.told_size)
    """What SDXL is told of the original picture's size, WIDTHxHEIGHT. (default: the canvas)"""
    crop: tuple[int, int] | None = options.option(None, options.point, str, metavar="LEFT,TOP")
    """What SDXL is told of the crop's corner. (default: 0,0)"""
    target_size: tuple[int, int] | None = options.option(None, options.told_size)
    """What SDXL is told of the target's size. (default: the canvas)"""
    seed: int | None = options.option(None, options.whole, int, shared=False)
    """Seed of the first image. (default: random, and printed)"""
    same_seed: bool = options.option(False, options.yes_or_no, bool, recorded=False, shared=False)
    """One seed for all pictures of a folder, such as a video's frames, also without --seed."""
    mode: str | None = options.option(None, options.text, recorded=False, shared=False)
    """balanced; prompt: deep connections count more; control: only on the half of the guidance with the prompt,
    weighted by resolution; guess: the same, deep ones more, for empty prompts. (default: the base's)"""
    control_on: str | None = options.option(None, options.text)
    """Halves of the guidance that are controlled: both, or cond (with the prompt). (default: the mode's, else the
    base's)"""
    weighting: str | tuple[float, ...] | None = options.option(None, options.weighting, recorded=False, shared=False)
    """Weights of the connections: uniform, resolution, soft, or 1/.5/... (default: the mode's)"""

    def __post_init__(self):
        # Texts become values.
        for name, option in OPTIONS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, option.read(name, value))

        for name in ("lora", "embedding"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())

        # As diffusers has it, and empty cells of CSV files.
        for name in ("prompt2", "negative2", "vae", "init", "mask"):
            if getattr(self, name) == "":
                object.__setattr__(self, name, None)

        # What each value must be.
        if not self.cond and not self.prompt and self.init is None:
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

        self._check_start()
        if self.hires is None and self.hires_strength is not None:
            raise UsageError(f"--hires-strength {self.hires_strength:g} without --hires", "--hires 2x")
        if self.hires is not None:
            given = self.hires_strength
            self._check_strength("hires-strength", HIRES_STRENGTH if given is None else given)
        if not 0 <= self.clip_skip <= 30:
            raise UsageError(f"--clip-skip {self.clip_skip}: expected 0 to 30", "--clip-skip 1")
        for flag in ("prompt", "negative", "prompt2", "negative2"):
            text = getattr(self, flag) or ""
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UsageError(f"--{flag} {text!r}: not UTF-8", "locale tells the terminal's own coding") from None

    def _check_start(self) -> None:
        """Raises UsageError for a strength that cannot be, or that leaves nothing to sample."""
        if self.mask is None and (bad := next((f for f in self.cond if f.region in (PAINTED, REST)), None)):
            raise UsageError(
                f"--cond {bad.path},region={bad.region} without --mask", "--init photo.jpg --mask mask.png"
            )
        if self.init is None:
            if self.strength is not None:
                raise UsageError(f"--strength {self.strength:g} without --init", "--init photo.jpg --strength 0.6")
            if self.mask is not None or self.invert_mask or self.feather or self.region_only:
                raise UsageError(
                    "--mask, --invert-mask, --feather and --region-only: no --init to paint on",
                    "--init photo.jpg --mask mask.png",
                )
            if any(flag.path == INIT for flag in self.cond):
                raise UsageError(f"--cond {INIT} without --init", f"--init photo.jpg --cond {INIT},detect=canny")
            return
        object.__setattr__(self, "cond", tuple(_of_init(flag, self.init) for flag in self.cond))
        if self.mask is None and (self.invert_mask or self.feather or self.region_only):
            raise UsageError("--invert-mask, --feather and --region-only: no --mask to change", "--mask mask.png")
        if not 0 <= self.feather <= 1000:
            raise UsageError(f"--feather {self.feather}: expected 0 to 1000 pixels", "--feather 16")
        self._check_strength("strength", self.strength_or_default)

    def _check_strength(self, flag: str, strength: float) -> None:
        if not 0 < strength <= 1:
            raise UsageError(f"--{flag} {strength:g}: expected a number above 0 and up to 1", f"--{flag} 0.6")
        if int(self.steps * strength) == 0:
            least = math.ceil(100 / self.steps) / 100
            raise UsageError(
                f"--{flag} {strength:g} of {self.steps} steps leaves none to make",
                f"--{flag} {least:g}, or more --steps",
            )

    @property
    def strength_or_default(self) -> float:
        if self.strength is None:
            return STRENGTH if self.mask is None else 1.0
        return self.strength

    @property
    def acts_on(self) -> str | None:
        """`both` halves of the guidance, or `cond`; None is the base's own way."""
        return self.control_on or (MODES[self.mode].control_on if self.mode else None)

    def weighting_of(self, flag: ConditionFlag) -> str | tuple[float, ...]:
        """The condition's own, else the job's, else the mode's, else uniform."""
        return flag.weighting or self.weighting or MODES[self.mode or "balanced"].weighting

    def settled(self, base: Any, size: tuple[int, int]) -> Job:
        """The job with the defaults that depend on base and conditions filled in: guidance, canvas, halves of the
        guidance, the negative prompt."""
        empty = None if base.zeros_for_none else ""
        return replace(
            self,
            negative=empty if self.negative is None else self.negative,
            size=size,
            guidance=base.guidance if self.guidance is None else self.guidance,
            control_on=self.acts_on or base.control_on,
            strength=None if self.init is None else self.strength_or_default,
            hires_strength=(self.hires_strength or HIRES_STRENGTH) if self.hires else None,
        )

    def record(self) -> dict[str, Any]:
        """The job's entries in an image's record."""
        return {name: getattr(self, name) for name, option in OPTIONS.items() if option.recorded}

    def shared(self) -> str:
        """The values that images sampled together must share, as one text."""
        return json.dumps([getattr(self, name) for name, option in OPTIONS.items() if option.shared])

    def content(self, folder: str | None = None) -> str:
        """All that is asked for, as text. Where its results go counts from `folder` on, that of all results, which
        may be another one on each machine."""
        values = {name: getattr(self, name) for name in OPTIONS}
        out, below = (str(remote.place(name or "out")) for name in (self.out, folder))
        values["out"] = out.removeprefix(below).strip("/")
        return json.dumps(list(values.values()), default=str)

    def looks(self) -> str:
        """What tells, without a model, which images can be made together: flags, and the size of the picture that
        decides the canvas, if one does."""
        acts = [replace(flag, path="", weighting=str(flag.weighting)) for flag in self.cond]
        size = size_of(self.shown) if self.shown and self.size is None else None
        return self.shared() + repr([acts, self.mode, self.weighting, size, self.init is None, self.mask is None])

    def seeded(self, fixed: bool = False, folder: str | None = None) -> Job:
        """The job with a seed if it has none: random, or `fixed` by what is asked for (`content`)."""
        if self.seed is not None:
            return self
        digest = int(hashlib.sha256(self.content(folder).encode(errors="surrogateescape")).hexdigest(), 16)
        return replace(self, seed=digest % 2**31 if fixed else random.randrange(2**31))

    @property
    def larger(self) -> tuple[int, int] | None:
        """The canvas (width, height) of the second pass; None if there is none. `size` must be set."""
        if self.hires is None or self.size is None:
            return None
        width, height = (round(side * self.hires / 8) * 8 for side in self.size)
        return width, height

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """(`lora` or `embedding`, where it comes from) of all that change the base."""
        loras = [("lora", options.lora_of(text)[0]) for text in self.lora]
        return loras + [("embedding", options.embedding_of(text)[0]) for text in self.embedding]

    @property
    def shown(self) -> str | None:
        """The picture whose aspect the canvas has: the one to start from, or the first condition's."""
        return self.init or (self.cond[0].path if self.cond else None)

    @property
    def stem(self) -> str:
        """The stem of its images' file names: the first condition's without its kind, so that no image is later taken
        for a map."""
        path = self.cond[0].path if self.cond else self.init
        return stem_of(path) if path else "image"

    @property
    def long_stem(self) -> str:
        """The names of all its pictures."""
        paths = [*(flag.path for flag in self.cond), self.init, self.mask]
        return "-".join(dict.fromkeys(stem_of(path) for path in paths if path and path != ALPHA)) or self.stem


def stem_of(path: str) -> str:
    stem = Path(member_of(path)).stem if path != "-" else "stdin"
    for kind in KINDS:
        stem = stem.removesuffix(f".{kind}").removesuffix(f"_{kind}")
    return stem or "image"


OPTIONS: dict[str, options.Option] = {f.name: f.metadata["option"] for f in fields(Job)}
KEYS = tuple(OPTIONS)
"""The keys of a job in a file: the flags of `generate`, with _ or - between words."""


def make_job(given: dict[str, Any], defaults: dict[str, Any]) -> Job:
    """A job from values under the names of KEYS, as text or JSON values, on top of `defaults`. Raises UsageError for
    unknown names, naming the nearest, and for values of the wrong type."""
    values = dict(defaults)
    folder = defaults.get("out")
    for name, value in given.items():
        key = name.replace("-", "_")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise UsageError(f"unknown key {name!r}, expected one of {', '.join(KEYS)}", (near or KEYS)[0])
        if value is None and key != "base":  # the field's own default, not the flag's
            values.pop(key, None)
            continue
        if value is None or (value == "" and key not in ("prompt", "negative")):
            continue
        values[key] = value
    values["cond"] = _of_samples(values.get("cond"), defaults.get("cond"))
    place = values.get("out")
    if folder and folder != "-" and place != folder and isinstance(place, str) and is_folder(folder, IMAGES):
        # Places in a file of jobs are below -o.
        values["out"] = str(remote.place(folder) / place) + "/" * place.endswith("/")
    return Job(**{key: value for key, value in values.items() if value is not None})


def _of_samples(given: Any, default: Any) -> Any:
    """The conditions of a sample in a tar file, with the keys of `--cond @sample,key=value`, if that is the default."""
    (template, *more) = [default] if isinstance(default, str) else list(default or [""])
    if not isinstance(template, str) or not template.startswith(SAMPLE) or more or given is default:
        return given
    return [f"{path}{template.removeprefix(SAMPLE)}" for path in ([given] if isinstance(given, str) else given or [])]
