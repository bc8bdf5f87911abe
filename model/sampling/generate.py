"""Stage two: prompts and conditions -> images. Joins the base, the ControlNets and the sampling loop.

Reads and writes no files; `work/studio.py` reads, the commands write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.base import Base
from controlnet.model.control.net import Feature, Net, cat_features
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.strength import Strength
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.memory import takes_halves_apart
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import ForInpainting, FromNoise, FromPicture, InMask, Start
from controlnet.model.sampling.tiles import Tile, Whole, canvas_of, control_in
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.log import doing
from torch import Tensor

BATCH = 4
"""How many images are sampled together. It bounds the memory; no image depends on it, up to rounding."""


Texts = tuple[str | None, str | None]
"""The text of the first text encoder, None for none at all; and of the second, None for the same."""


@dataclass(frozen=True)
class Request:
    """All that is particular to one image."""

    prompt: str
    seed: int
    conditions: tuple[np.ndarray, ...] = ()
    """One for each ControlNet: (H, W, 3) uint8 on the canvas."""
    types: tuple[int, ...] = ()
    """Of the conditions, for ControlNets that tell types apart; alike in all requests."""
    negative: str | None = ""
    """None is no prompt at all (see `Base.zeros_for_none`)."""
    prompt2: str | None = None
    """The prompt of a second text encoder; None: the same."""
    negative2: str | None = None
    init: np.ndarray | None = None
    """A picture to start from, (H, W, 3) uint8 on the canvas. All requests have one, or none has."""
    mask: np.ndarray | None = None
    """Where it is made anew, (H, W) bool on the canvas; None: everywhere. All requests have one, or none has."""

    @property
    def texts(self) -> Texts:
        return self.prompt, self.prompt2

    @property
    def negatives(self) -> Texts:
        return self.negative, self.negative2


@dataclass
class Encoded:
    """Prompts and features of the last images, so that those that the next images share are not computed again."""

    prompts: dict[tuple[Texts, int, bool], Prompt] = field(default_factory=dict)
    """The key is the texts, the number of layers skipped, and whether the texts have weights."""
    features: dict[tuple[int, int], tuple[np.ndarray, Feature]] = field(default_factory=dict)
    """The key is the `id` of network and condition. The condition is kept with its feature, so that Python gives its
    `id` to no other."""
    latents: dict[tuple[Any, ...], tuple[Any, Tensor]] = field(default_factory=dict)
    """Of pictures to start from; the key is the `id` of VAE, picture and what is hidden of it, and the tiles."""

    def encode_texts(self, base: Base, texts: set[Texts], clip_skip: int, emphasis: bool) -> None:
        """Encode the texts that are new, and forget the prompts of all others."""
        kept = {}
        for first, second in texts:
            key = (first, second), clip_skip, emphasis
            seconds = None if second is None else [second]
            kept[key] = self.prompts.get(key) or base.encode_text([first], seconds, clip_skip, emphasis)
        self.prompts = kept

    def prompt(self, texts: Sequence[Texts], clip_skip: int, emphasis: bool, ids: Tensor | None) -> Prompt:
        """The prompt with one row per text; `ids` (1, 6) are the canvas's, None in families without them."""
        return Prompt.cat([self.prompts[text, clip_skip, emphasis] for text in texts]).with_ids(ids)

    def read(self, base: Base, nets: Sequence[Net], columns: Sequence[Sequence[np.ndarray]]) -> list[Feature]:
        """The features of each network's conditions: (B, C, h, w), or (1, C, h, w) when all images share one. What
        is new is computed, all others are forgotten."""
        kept = {}
        for net, column in zip(nets, columns, strict=True):
            for condition in column:
                key = id(net), id(condition)
                if key not in kept:
                    kept[key] = self.features.get(key) or (condition, net.prepare(_input(condition, base)))
        self.features = kept
        return [self._feature(net, column) for net, column in zip(nets, columns, strict=True)]

    def encode_pictures(
        self, base: Base, requests: Sequence[Request], hide: bool, canvas: Whole
    ) -> tuple[Tensor, Tensor | None]:
        """z_0 (B, C, h, w) of the pictures that images start from, float32, the mean of what the VAE says; and with
        `hide` of the pictures without what is in their masks. Those of other pictures are forgotten."""
        kept: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        columns = []
        for hides in (False, True)[: 1 + hide]:
            rows = []
            for request in requests:
                picture, hidden = request.init, request.mask if hides else None
                assert picture is not None
                key = id(base.vae), id(picture), id(hidden), canvas.key
                known = kept.get(key) or self.latents.get(key)
                kept[key] = known or ((picture, hidden), canvas.latent_of(base, picture, hidden))
                rows.append(kept[key][1])
            columns.append(torch.cat(rows))
        self.latents = kept
        return columns[0], columns[1] if hide else None

    def _feature(self, net: Net, conditions: Sequence[np.ndarray]) -> Feature:
        features = [self.features[id(net), id(condition)][1] for condition in conditions]
        return features[0] if all(one is features[0] for one in features) else cat_features(features)


@torch.no_grad()
def generate(
    base: Base,
    requests: Iterable[Request],
    nets: Sequence[tuple[Net, Strength]] = (),
    size: tuple[int, int] | None = None,
    steps: int = 20,
    guidance: float | None = None,
    scheduler: str | None = None,
    on_step: Callable[[float], None] = lambda images: None,
    encoded: Encoded | None = None,
    batch: int = BATCH,
    clip_skip: int = 0,
    ids: Tensor | None = None,
    strength: float = 1.0,
    emphasis: bool = False,
    tile: int | None = None,
) -> Iterator[np.ndarray]:
    """An image (H, W, 3) uint8 for each request, in order; up to rounding, no image depends on the others.

    `size` is (width, height) in pixels. `size`, `guidance`, `scheduler` and the halves of the guidance that control
    acts on default to the base's own. `clip_skip` is the number of layers left out at the end of the text encoders.
    With `emphasis` the prompts may have weights and any length (emphasis.py). `tile` is the side in pixels of the tiles
    that a larger canvas is sampled in, None for none (tiles.py); `ids` are then a tile's.
    `strength` is the share of the schedule that is made where the requests start from pictures. `on_step` is called
    with the number of images made, fractions included. Raises ModelError when the latents are not finite."""
    guidance = base.guidance if guidance is None else guidance
    width, height = size or (base.native_size, base.native_size)
    shape = (base.channels, height // base.factor, width // base.factor)
    canvas = canvas_of(shape[1:], tile and tile // base.factor)
    nets = [(net, replace(how, control_on=how.control_on or base.control_on)) for net, how in nets]
    networks = [net for net, _ in nets]
    encoded = encoded or Encoded()
    ids = base.size_ids((width, height)) if ids is None else ids
    made = 0
    for group in _groups(requests, 1 if base.low_memory or base.engine.alone else batch):
        # What the images of a group need, encoded once per text and once per condition.
        prompt, negative = _prompts(base, encoded, group, guidance != 1, clip_skip, emphasis, ids)  # B rows
        columns = [[request.conditions[k] for request in group] for k in range(len(networks))]
        with doing("conditions"), base.at_work(*networks):
            features = encoded.read(base, networks, columns) if canvas.reads_whole else [[] for _ in columns]
        controls = _controls(nets, features, group[0].types)
        around = partial(canvas.around, controls_of=partial(_controls_in, base, controls, columns))

        # All of them at once, each from its own noise.
        start = _start(base, encoded, group, shape, strength, canvas)
        tell = partial(_tell_step, on_step, made, len(group))
        own = make_scheduler(base.scheduler, scheduler)
        apart = takes_halves_apart(base, (width, height) if tile is None else (tile, tile))
        what = f"sampling of {len(group)} at {width}x{height} in {steps} steps by {base.engine.name}"
        with doing(what), base.at_work(base.unet, *networks):
            latents = sample(  # (B, C, h, w)
                base.unet, own, start, prompt, negative, controls, steps, guidance, tell, apart, around, base.engine
            )
        if not torch.isfinite(latents).all():
            raise ModelError(f"the latents are not finite in {base.dtype}", "--dtype float32")

        # Decoded one by one: the decoder takes more memory than everything before.
        for latent in latents:
            with doing("decoding"):
                image = canvas.decoded(base, latent[None])
            yield image
        made += len(group)


def _prompts(
    base: Base,
    encoded: Encoded,
    group: Sequence[Request],
    guided: bool,
    clip_skip: int,
    emphasis: bool,
    ids: Tensor | None,
) -> tuple[Prompt, Prompt | None]:
    """What the two halves of the guidance read, a row for each request; without guidance there is one half."""
    prompts, negatives = [r.texts for r in group], [r.negatives for r in group]
    with doing("texts"):
        encoded.encode_texts(base, set(prompts) | (set(negatives) if guided else set()), clip_skip, emphasis)
    negative = encoded.prompt(negatives, clip_skip, emphasis, ids) if guided else None
    return encoded.prompt(prompts, clip_skip, emphasis, ids), negative


def _controls(
    nets: Sequence[tuple[Net, Strength]], features: Sequence[Feature], types: Sequence[int]
) -> list[ActiveNet]:
    """Each network with its feature; of type 0 where the requests name none."""
    return [
        ActiveNet(net, feature, how, *types[k : k + 1])
        for k, ((net, how), feature) in enumerate(zip(nets, features, strict=True))
    ]


def _controls_in(
    base: Base, controls: Sequence[ActiveNet], columns: Sequence[Sequence[np.ndarray]], tile: Tile
) -> list[ActiveNet]:
    """The controls of a tile, whose conditions are the columns'."""

    def prepare(net: Net, parts: Sequence[np.ndarray]) -> Feature:
        return cat_features([net.prepare(_input(part, base)) for part in parts])

    regions: dict[int, np.ndarray] = {}  # conditions with one region keep sharing it: unions take them in one pass
    return [
        control_in(tile, one, conditions, prepare, base.factor, regions)
        for one, conditions in zip(controls, columns, strict=True)
    ]


def _start(
    base: Base,
    encoded: Encoded,
    group: Sequence[Request],
    shape: tuple[int, int, int],
    strength: float,
    canvas: Whole,
) -> Start:
    """Where the sampling of a group begins; its requests all have a picture and a mask, or none has."""
    noise = FromNoise.seeded([request.seed for request in group], shape)
    if all(request.init is None for request in group):
        return noise
    masks = [request.mask for request in group if request.mask is not None]
    z0, shown = encoded.encode_pictures(base, group, base.is_inpainting and bool(masks), canvas)
    if not masks:
        return FromPicture(noise.noise, noise.generators, z0, strength)
    cells = torch.cat([_cells(mask, shape[1:]) for mask in masks])
    if shown is None:
        return InMask(noise.noise, noise.generators, z0, strength, cells)
    return ForInpainting(noise.noise, noise.generators, z0, strength, cells, shown)


def _tell_step(on_step: Callable[[float], None], before: int, count: int, done: int, of: int) -> None:
    on_step(before + count * done / of)


def _groups(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    iterator = iter(requests)
    while group := list(islice(iterator, size)):
        yield group


def _cells(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The latent cells (1, 1, h, w) that a mask touches: 1, the others 0."""
    whole = torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None]
    return F.adaptive_max_pool2d(whole, size)


def _input(condition: np.ndarray, base: Base) -> Tensor:
    return condition_tensor(condition)[None].to(base.device, base.dtype)
