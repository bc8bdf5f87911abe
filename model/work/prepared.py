"""What a studio makes: an image with its record, and before that all that it is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from controlnet.model.base import Base
from controlnet.model.control.strength import Strength
from controlnet.model.sampling.generate import Encoded, Request
from controlnet.model.work.a1111 import parameters
from controlnet.model.work.batch import Wanted
from controlnet.model.work.jobs import Job
from controlnet.model.work.paint import Painting
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import picture_bytes, read_image
from controlnet.preprocessors.kinds import kind_named
from controlnet.preprocessors.metadata import dump
from controlnet.preprocessors.stage_one import version


@dataclass(frozen=True, eq=False)
class Image:
    """An image that was made: its pixels (H, W, 3) uint8, and the record that makes it again."""

    wanted: Wanted
    pixels: np.ndarray
    record: dict[str, Any]

    def png(self) -> bytes:
        """A PNG that carries the record, and the `parameters` text that other tools read."""
        return self.encoded(".png")

    def encoded(self, ending: str) -> bytes:
        """The same as a file of the type that an ending (outputs.IMAGES) stands for."""
        return picture_bytes(self.pixels, {**dump(self.record), "parameters": parameters(self.record)}, ending)

    def pixels_in(self, ending: str) -> np.ndarray:
        """What such a file has of the pixels: all of them in a PNG, nearly the same in the others."""
        return read_image(self.encoded(ending), f"an image{ending}")[0]


@dataclass(frozen=True, eq=False)
class ActiveCondition:
    """A condition at work: its ControlNet, its strength, its map on the canvas, and its entry in the record."""

    net: Any
    strength: Strength
    map: np.ndarray
    entry: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A wanted image with all that it is made from; its job is settled. Images of equal `shared` are made together."""

    wanted: Wanted
    job: Job
    base: Base
    encoded: Encoded
    acting: list[ActiveCondition]
    init: np.ndarray | None
    """The picture to start from, on the canvas."""
    mask: np.ndarray | None
    """Where it is made anew, on the canvas."""
    painting: Painting | None
    """Where the result is laid over."""
    shared: str
    record: dict[str, Any]

    larger: list[ActiveCondition] = field(default_factory=list)
    """The conditions on the canvas of the second pass, if there is one."""

    @property
    def request(self) -> Request:
        return self._request(self.acting, self.init, self.mask)

    def request_of(self, image: np.ndarray, size: tuple[int, int]) -> Request:
        """The request of the second pass, from an image of the first one, on a canvas (width, height)."""
        init, mask = fit(image, size, "stretch"), None
        if self.painting is not None:
            photo, mask = self.painting.on_canvas(size)
            init = np.where(mask[..., None], init, photo)
        return self._request(self.larger, init, mask)

    def _request(self, acting: list[ActiveCondition], init: np.ndarray | None, mask: np.ndarray | None) -> Request:
        maps = tuple(one.map for one in acting)
        job = self.job
        types = tuple(kind_named(one.entry["kind"]).union_type or 0 for one in acting)
        texts = job.negative, job.prompt2, job.negative2
        return Request(job.prompt, self.wanted.seed, maps, types, *texts, init, mask)


@cache
def versions() -> dict[str, str]:
    return {
        "controlnet": version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
