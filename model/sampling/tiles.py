"""Canvases larger than a base knows, or than memory holds: each evaluation is made in tiles that overlap, and their
predictions are blended (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113). All tiles take each step together, so
there are no seams to hide, and the memory is that of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from controlnet.model.base import Base
from controlnet.model.sampling.canvas import to_pixels
from controlnet.model.sampling.loop import ActiveNet, Evaluation
from torch import Tensor

Prediction = Callable[[Tensor, int], Tensor]
"""(z_t, number of the evaluation) -> the base's prediction."""
OVERLAP = 0.375
"""The least part of a tile's side that it shares with the next one."""


@dataclass(frozen=True)
class Tile:
    """A part of a canvas, in latent cells."""

    top: int
    left: int
    height: int
    width: int

    def of(self, latent: Tensor) -> Tensor:
        """Its part of latents (..., h, w)."""
        return latent[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def of_pixels(self, picture: np.ndarray, factor: int) -> np.ndarray:
        """Its part of a picture (H, W, ...) with `factor` pixels a cell."""
        rows = slice(self.top * factor, (self.top + self.height) * factor)
        columns = slice(self.left * factor, (self.left + self.width) * factor)
        return np.ascontiguousarray(picture[rows, columns])


def tiles_of(size: tuple[int, int], side: int) -> list[Tile]:
    """Tiles of at most side x side cells that cover a canvas (height, width), evenly spread."""
    height, width = (min(side, one) for one in size)
    tops, lefts = (_starts(one, side) for one in size)
    return [Tile(top, left, height, width) for top in tops for left in lefts]


def _starts(whole: int, side: int) -> list[int]:
    if whole <= side:
        return [0]
    count = 1 + math.ceil((whole - side) / (side * (1 - OVERLAP)))
    return [round(k * (whole - side) / (count - 1)) for k in range(count)]


def weights_of(tile: Tile) -> Tensor:
    """How much each cell of a tile counts, (h, w): most in the middle, little but never nothing at its border."""
    rows, columns = ((torch.arange(side) + 0.5) / side for side in (tile.height, tile.width))  # centres of cells
    return torch.outer(torch.sin(math.pi * rows), torch.sin(math.pi * columns)) ** 2


class InTiles:
    """An evaluation in tiles, in the place of a whole one. `controls_of` gives the controls of a tile, which are made
    anew for each evaluation: that costs little, and their features are never all in memory."""

    def __init__(
        self, evaluation: Evaluation, tiles: Sequence[Tile], controls_of: Callable[[Tile], Sequence[ActiveNet]]
    ):
        self.evaluation, self.tiles, self.controls_of = evaluation, tiles, controls_of

    def __call__(self, z_t: Tensor, i: int) -> Tensor:
        """The prediction (B, C, h, w) for z_t (B, C', h, w) in evaluation i."""
        total: Tensor | None = None
        counted = torch.zeros(z_t.shape[-2:], device=z_t.device, dtype=z_t.dtype)
        for tile in self.tiles:
            part = self.evaluation.under(self.controls_of(tile))(tile.of(z_t), i)
            total = part.new_zeros(*part.shape[:2], *z_t.shape[-2:]) if total is None else total
            weights = weights_of(tile).to(part)
            tile.of(total).add_(weights * part)
            tile.of(counted).add_(weights)
        assert total is not None
        return total / counted


def control_in(
    tile: Tile,
    one: ActiveNet,
    conditions: Sequence[np.ndarray],
    prepare: Callable,
    factor: int,
    regions: dict[int, np.ndarray],
) -> ActiveNet:
    """A control at work in a tile: the features of its part of the conditions, and its part of the region, which
    `regions` keeps by the `id` of the whole one."""
    parts = [tile.of_pixels(condition, factor) for condition in conditions]
    region, strength = one.strength.region, one.strength
    if region is not None:
        if id(region) not in regions:
            regions[id(region)] = tile.of_pixels(region, factor)
        strength = replace(strength, region=regions[id(region)])
    return replace(one, feature=prepare(one.net, parts), strength=strength)


class Whole:
    """A canvas that is sampled, encoded and decoded as a whole."""

    key: tuple = ()
    """What tells it from canvases in other tiles."""
    reads_whole = True
    """Whether a network reads a condition as a whole, before the sampling."""

    def latent_of(self, base: Base, picture: np.ndarray, hidden: np.ndarray | None) -> Tensor:
        """z_0 (1, C, h, w) of a picture (H, W, 3), see `Base.latent_of`."""
        return base.latent_of(picture, hidden)

    def around(self, evaluation: Evaluation, controls_of: Callable[[Tile], Sequence[ActiveNet]]) -> Prediction:
        """What is called in the place of an evaluation."""
        return evaluation

    def decoded(self, base: Base, latent: Tensor) -> np.ndarray:
        """The picture (H, W, 3) uint8 of latents (1, C, h, w)."""
        return to_pixels(base.decode(latent.to(base.dtype)))[0]


class Tiled(Whole):
    """The same a tile at a time; of the picture no more than a row of tiles is ever in floating point."""

    reads_whole = False

    def __init__(self, tiles: Sequence[Tile]):
        self.tiles = tiles
        self.key = tuple((tile.top, tile.left) for tile in tiles)

    def latent_of(self, base: Base, picture: np.ndarray, hidden: np.ndarray | None) -> Tensor:
        height, width = (side // base.factor for side in picture.shape[:2])
        total, counted = torch.zeros(1, base.channels, height, width), torch.zeros(height, width)
        for tile in self.tiles:
            part = None if hidden is None else tile.of_pixels(hidden, base.factor)
            weights = weights_of(tile)
            tile.of(total).add_(weights * base.latent_of(tile.of_pixels(picture, base.factor), part).cpu())
            tile.of(counted).add_(weights)
        return (total / counted).to(base.device)

    def around(self, evaluation: Evaluation, controls_of: Callable[[Tile], Sequence[ActiveNet]]) -> Prediction:
        return InTiles(evaluation, self.tiles, controls_of)

    def decoded(self, base: Base, latent: Tensor) -> np.ndarray:
        height, width = (side * base.factor for side in latent.shape[-2:])
        picture = np.empty((height, width, 3), np.uint8)
        rows = [(top, list(row)) for top, row in groupby(self.tiles, lambda tile: tile.top)]
        ends = [top for top, _ in rows[1:]] + [latent.shape[-2]]
        left_over = torch.zeros(4, 0, width)  # red, green, blue, and how much is counted
        for (top, row), end in zip(rows, ends, strict=True):
            band = torch.zeros(4, row[0].height * base.factor, width)
            band[:, : left_over.shape[1]] = left_over
            for tile in row:
                _add_decoded(band, base, tile, latent)
            done = (end - top) * base.factor
            picture[top * base.factor : end * base.factor] = to_pixels((band[:3, :done] / band[3, :done])[None])[0]
            left_over = band[:, done:].clone()
        return picture


def _add_decoded(band: Tensor, base: Base, tile: Tile, latent: Tensor) -> None:
    """Add a tile's picture and its weights to a band (4, H', W) of the canvas."""
    weights = weights_of(replace(tile, height=tile.height * base.factor, width=tile.width * base.factor))
    columns = slice(tile.left * base.factor, (tile.left + tile.width) * base.factor)
    band[:3, :, columns] += weights * base.decode(tile.of(latent).to(base.dtype))[0].cpu()
    band[3, :, columns] += weights


def canvas_of(size: tuple[int, int], side: int | None) -> Whole:
    """A canvas (height, width) in cells, in tiles of at most `side` cells if it is larger."""
    tiles = tiles_of(size, side) if side else []
    return Tiled(tiles) if len(tiles) > 1 else Whole()
