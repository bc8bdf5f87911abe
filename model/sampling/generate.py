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
import psutil
import torch
import torch.nn.functional as F
from controlnet.model.base import Base
from controlnet.model.control.net import Feature, Net, cat_features
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.strength import Strength
from controlnet.model.sampling.canvas import condition_tensor, to_pixels
from controlnet.model.sampling.loop import ActiveNet, Evaluation, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import ForInpainting, FromNoise, FromPicture, InMask, Start
from controlnet.model.sampling.tiles import InTiles, Tile, control_in, decoded_in, latent_in, tiles_of
from controlnet.preprocessors.errors import ModelError, UsageError
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

    def prepare(self, base: Base, nets: Sequence[Net], requests: Sequence[Request]) -> None:
        """Compute the features of conditions that are new, and forget those of all others."""
        kept = {}
        for request in requests:
            for net, condition in zip(nets, request.conditions, strict=True):
                key = id(net), id(condition)
                if key not in kept:
                    kept[key] = self.features.get(key) or (condition, net.prepare(_input(condition, base)))
        self.features = kept

    def encode_pictures(
        self, base: Base, requests: Sequence[Request], hide: bool, grid: Sequence[Tile] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """z_0 (B, C, h, w) of the pictures that images start from, float32, the mean of what the VAE says, in the tiles
        of a grid if there is one; and with `hide` of the pictures without what is in their masks. Those of other
        pictures are forgotten."""
        kept: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        columns = []
        for hides in (False, True)[: 1 + hide]:
            rows = []
            for request in requests:
                picture, hidden = request.init, request.mask if hides else None
                assert picture is not None
                key = id(base.vae), id(picture), id(hidden), *((tile.top, tile.left) for tile in grid)
                known = kept.get(key) or self.latents.get(key)
                if known is None:
                    z0 = latent_in(grid, base, picture, hidden) if grid else base.latent_of(picture, hidden)
                    known = (picture, hidden), z0
                kept[key] = known
                rows.append(kept[key][1])
            columns.append(torch.cat(rows))
        self.latents = kept
        return columns[0], columns[1] if hide else None

    def feature(self, net: Net, conditions: Sequence[np.ndarray]) -> Feature:
        """The features (B, C, h, w) of B conditions, or (1, C, h, w) when all images share one."""
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
    tiles = tiles_of(shape[1:], tile // base.factor) if tile else []
    grid = tiles if len(tiles) > 1 else []
    strengths = [replace(how, control_on=how.control_on or base.control_on) for _, how in nets]
    networks = [net for net, _ in nets]
    encoded = encoded or Encoded()
    ids = base.size_ids((width, height)) if ids is None else ids
    made = 0
    for group in _groups(requests, 1 if base.low_memory else batch):
        # What the images of a group need, encoded once per text and once per condition.
        prompts, negatives = [r.texts for r in group], [r.negatives for r in group]
        guided = guidance != 1
        encoded.encode_texts(base, set(prompts) | (set(negatives) if guided else set()), clip_skip, emphasis)
        if not grid:
            with base.at_work(*networks):
                encoded.prepare(base, networks, group)
        prompt = encoded.prompt(prompts, clip_skip, emphasis, ids)  # B rows
        negative = encoded.prompt(negatives, clip_skip, emphasis, ids) if guided else None
        columns = [[request.conditions[k] for request in group] for k in range(len(networks))]
        controls = [  # of type 0 where the requests name none
            ActiveNet(net, [] if grid else encoded.feature(net, column), strength, *group[0].types[k : k + 1])
            for k, (net, column, strength) in enumerate(zip(networks, columns, strengths, strict=True))
        ]
        around = partial(_in_tiles, base, grid, controls, columns) if grid else _whole

        # All of them at once, each from its own noise.
        start = _start(base, encoded, group, shape, strength, grid)
        tell = partial(_tell_step, on_step, made, len(group))
        own = make_scheduler(base.scheduler, scheduler)
        with base.at_work(base.unet, *networks):
            latents = sample(
                base.unet, own, start, prompt, negative, controls, steps, guidance, tell, base.low_memory, around
            )  # (B, C, h, w)
        if not torch.isfinite(latents).all():
            raise ModelError(f"the latents are not finite in {base.dtype}", "--dtype float32")

        # Decoded one by one: the decoder takes more memory than everything before.
        for latent in latents:
            if grid:
                yield decoded_in(grid, base, latent[None])
            else:
                yield to_pixels(base.decode(latent[None].to(base.dtype)))[0]
        made += len(group)


def _whole(evaluation: Evaluation) -> Evaluation:
    return evaluation


def _in_tiles(
    base: Base,
    grid: Sequence[Tile],
    controls: Sequence[ActiveNet],
    columns: Sequence[Sequence[np.ndarray]],
    evaluation: Evaluation,
) -> InTiles:
    """The evaluation in tiles, under controls whose conditions are the columns."""

    def prepare(net: Net, parts: Sequence[np.ndarray]) -> Feature:
        return cat_features([net.prepare(_input(part, base)) for part in parts])

    def controls_of(tile: Tile) -> list[ActiveNet]:
        regions: dict[int, np.ndarray] = {}  # conditions with one region keep sharing it: unions take them in one pass
        return [
            control_in(tile, one, conditions, prepare, base.factor, regions)
            for one, conditions in zip(controls, columns, strict=True)
        ]

    return InTiles(evaluation, grid, controls_of)


def _start(
    base: Base,
    encoded: Encoded,
    group: Sequence[Request],
    shape: tuple[int, int, int],
    strength: float,
    grid: Sequence[Tile],
) -> Start:
    """Where the sampling of a group begins; its requests all have a picture and a mask, or none has."""
    noise = FromNoise.seeded([request.seed for request in group], shape)
    if all(request.init is None for request in group):
        return noise
    masks = [request.mask for request in group if request.mask is not None]
    z0, shown = encoded.encode_pictures(base, group, base.is_inpainting and bool(masks), grid)
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


TILE = 512
"""Pixels of the side of the tiles that `low_memory` decodes in."""


def check_memory(base: Base, size: tuple[int, int], low_memory: bool, tile: int | None = None) -> None:
    """Raises UsageError for a canvas (width, height) that does not fit into the free memory, or of which no tile of
    this side does. The estimate counts the
    numbers alive at once: 14 per channel and pixel in the decoder (measured at 512 to 768 pixels, benchmarks/LOG.md),
    and 40 per channel and latent cell in the UNet, for each half of the guidance."""
    width, height = (min(side, tile) for side in size) if tile else size
    config = base.vae.config
    channels = (config.get("block_out_channels") or config.decoder_block_out_channels)[0]
    decoder = 14 * channels * (TILE**2 if low_memory else width * height)
    cells = width * height / base.factor**2
    unet = 40 * base.unet.config.block_out_channels[0] * cells * (1 if low_memory else 2)
    needed, free = max(decoder, unet) * base.dtype.itemsize, free_memory(base.device)
    if needed > free:
        fits = int((free / needed) ** 0.5 * min(size)) // 64 * 64
        raise UsageError(
            ("a tile of " if tile else "size ")
            + f"{width}x{height}: needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB of memory are free",
            ("" if low_memory else "--low-memory; ")
            + ("another --dtype" if tile else f"--tiles; or --size {max(64, fits)}"),
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
