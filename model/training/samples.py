"""From pairs to batches. All that is random in a sample (crop, flip, prompt dropout, timestep, noise) comes from a
generator seeded by (seed, epoch, the pair's number). So a batch is the same with and without cache, in one process or
several, interrupted or not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from controlnet.model.base import Base
from controlnet.model.control.prompt import Prompt
from controlnet.model.load import reload
from controlnet.model.sampling.canvas import condition_tensor, on_canvas
from controlnet.model.training.cache import Cache, key_of
from controlnet.model.training.config import TrainConfig
from controlnet.model.training.objective import Batch
from controlnet.model.training.order import Bucketed, Order, Shuffled, Size, bucket_of
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.data.check import same_aspect
from controlnet.preprocessors.data.mirror import cut_condition, flip_condition, flip_words
from controlnet.preprocessors.data.pair import Pair
from controlnet.preprocessors.detectors.registry import DETECTORS, find_detector
from controlnet.preprocessors.errors import InputError, NothingFoundError
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import picture_size
from controlnet.preprocessors.stage_one import stage_one
from controlnet.preprocessors.weights import digests
from torch import Tensor

VALIDATION_TIMES = 4
"""The number of timesteps at which each held-out pair is evaluated."""
ZOOM = 1.25
"""How much closer a random crop may be than the centre one."""


class Samples:
    """The training data of a run, as the network sees it.

    `pairs` are all pairs, or of a stream the first ones; `order` says which is taken when. With `bucketed`, a pair's
    canvas has the aspect of its picture instead of being square. `base` computes latents and texts that are not in the
    cache. Arrays: latent moments (2C, h, w), or (C, h, w) without variance, float16, text (T, D) float16, condition
    (H, W, 3) uint8.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        config: TrainConfig,
        base: Base,
        base_hash: str,
        cache: Cache,
        order: Order | None = None,
        bucketed: bool = False,
    ):
        self.pairs, self.config, self.base, self.base_hash, self.cache = pairs, config, base, base_hash, cache
        self.check_command = check_command(pairs[0].image.parent if pairs else Path("DATA"), config.kind)
        self.size = config.size or base.native_size
        self.detector = find_detector(config.kind) if config.kind in DETECTORS else None
        self.encoded: tuple[str | None, Any] = ("", None)
        self.bucketed = bucketed
        self.order = order or self._order_in_memory()

    def _order_in_memory(self) -> Order:
        """The order of pairs that are all known."""
        rest = self.config.seed, self.config.batch_size
        if not self.bucketed:
            return Shuffled(self.pairs, *rest)
        return Bucketed(self.pairs, [self.canvas(pair) for pair in self.pairs], *rest)

    def canvas(self, pair: Pair) -> Size:
        """The size (width, height) at which the network sees a pair."""
        if not self.bucketed:
            return self.size, self.size
        return bucket_of(self._size_of(pair), self.size, 8 * 2 ** (len(self.base.unet.config.block_out_channels) - 1))

    def _size_of(self, pair: Pair) -> Size:
        return self.cache.picture_size(self._hash(pair, pair.image), lambda: picture_size(pair.read(pair.image)))

    @property
    def identity(self) -> list:
        """What, besides the pairs, decides what is kept of them in the cache."""
        config = self.config
        return [self.base_hash, config.kind, self.size, config.crops, config.flip, config.buckets, self.made_by]

    @cached_property
    def made_by(self) -> list:
        """The detector that makes conditions of photos: its name, options and weights, which are fetched first."""
        if self.detector is None or all(pair.condition for pair in self.pairs):
            return []
        self.detector.ready(self.detector.load_options()())
        weights = [digests(name) for name in self.detector.weights]
        return [self.detector.name, str(self.detector.load_options()()), weights]

    def prepare(self, rows: range, on_item: Callable[[int], None] = lambda done: None) -> None:
        """Put everything that the pairs in `rows` need into the cache. Raises InputError saying how many pairs cannot
        be used, and why the first one cannot."""
        failed: list[InputError] = []
        for done, index in enumerate(rows, 1):
            pair = self.pairs[index]
            try:
                for flip in (False, True)[: 1 + self.config.flip]:
                    self.text(caption_of(pair, flip)), self.pooled(caption_of(pair, flip))
                    for crop in range(self.config.crops):
                        self.moments(pair, crop, flip)
                        self.condition(pair, crop, flip)
            except InputError as error:
                failed.append(error)
            on_item(done)
        self.text(None), self.pooled(None)
        self.cache.remember()
        if len(failed) > 1:
            first = failed[0]
            raise type(first)(f"{len(failed)} of {len(rows)} pairs cannot be used, the first: {first}", first.hint)
        if failed:
            raise failed[0]

    def text(self, caption: str | None) -> np.ndarray:
        """c_t of a caption, (T, D); None is no prompt at all."""
        key = key_of(self.base_hash, caption)
        return self.cache.array("text", key, lambda: _array(self._encode_text(caption).c_t))

    def pooled(self, caption: str | None) -> np.ndarray | None:
        """The pooled text of a caption, (P,); None if the base has no added embedding."""
        if not self.base.has_size_ids:
            return None
        key = key_of(self.base_hash, caption)
        return self.cache.array("pooled", key, lambda: _array(self._encode_text(caption).pooled))

    def prompt(self, captions: Sequence[str | None], canvas: Size | None = None) -> Prompt:
        """A prompt with a row for each caption, on the CPU, float32; `canvas` is square by default."""
        c_t = torch.from_numpy(np.stack([self.text(caption) for caption in captions])).float()
        ids = self.base.size_ids(canvas or (self.size, self.size))
        if ids is None:
            return Prompt(c_t)
        rows = [row for caption in captions if (row := self.pooled(caption)) is not None]
        pooled = torch.from_numpy(np.stack(rows)).float()
        return Prompt(c_t, pooled).with_ids(ids.cpu())

    def moments(self, pair: Pair, crop: int, flip: bool) -> np.ndarray:
        """Mean and log variance of the latent, or the latent itself if the VAE has no variance."""
        place = self._place(pair, crop, flip)
        key = key_of(self.base_hash, self._hash(pair, pair.image), *place)
        return self.cache.array("latents", key, lambda: self._encode_image(self.picture(pair, crop, flip)))

    def condition(self, pair: Pair, crop: int, flip: bool) -> np.ndarray:
        made_by = self.made_by if pair.condition is None else "given"
        files = [self._hash(pair, file) for file in (pair.condition or pair.image, pair.image)]
        place = self._place(pair, crop, flip)
        key = key_of(files, self.config.kind, made_by, *place)  # both files, since their aspects must agree
        return self.cache.array("conditions", key, lambda: self._condition(pair, crop, flip))

    def _place(self, pair: Pair, crop: int, flip: bool) -> tuple:
        """What of a picture is seen, for the key of the cache."""
        width, height = self.canvas(pair)
        return width if width == height else f"{width}x{height}", crop, crop and crop_seed(pair), flip

    def picture(self, pair: Pair, crop: int, flip: bool = False) -> np.ndarray:
        """A crop of a pair's picture on its canvas, (H, W, 3) uint8."""
        canvas = self.canvas(pair)
        image = cut(pair.picture(), crop, crop_seed(pair), canvas[0] / canvas[1])
        image = fit(image, canvas, "stretch")
        return np.ascontiguousarray(image[:, ::-1]) if flip else image

    def _condition(self, pair: Pair, crop: int, flip: bool) -> np.ndarray:
        made = self._detected(pair, crop) if pair.condition is None else self._read(pair, crop)
        placed = on_canvas(made, self.canvas(pair))
        return (flip_condition(placed) if flip else placed).rgb

    def _detected(self, pair: Pair, crop: int) -> Condition:
        """The condition of a photo's crop: detected at 512 pixels, as `detect` does it, or at the training size if it
        is larger."""
        if self.detector is None:
            raise InputError(
                f"{pair.image}: no condition, and no detector for kind {self.config.kind!r}", "--kind canny"
            )
        width, height = self.canvas(pair)
        enlarged = max(1, 512 // min(width, height)) if self.bucketed else 1
        side = max(512, self.size)
        size = (width * enlarged, height * enlarged) if width != height else (side, side)
        photo = cut(pair.picture(), crop, crop_seed(pair), width / height)
        ready = self.detector.ready(self.detector.load_options()())
        try:
            return stage_one(photo, ready, size, "stretch", str(pair.image))
        except NothingFoundError as error:
            raise NothingFoundError(
                f"{pair.image}: {error}",
                f"controlnet dataset build {pair.image.parent} --kind {self.config.kind} -o DATA leaves such photos"
                " out; then: controlnet train DATA",
            ) from error

    def _read(self, pair: Pair, crop: int) -> Condition:
        """The crop of a condition that came with its picture."""
        condition = pair.read_condition(self.config.kind)
        assert condition is not None
        height, width = pair.picture().shape[:2]
        if not same_aspect(condition.size, (width, height)):
            raise InputError(
                f"{pair.condition}: {condition.size[0]}x{condition.size[1]} for a picture of {width}x{height}",
                f"{self.check_command} lists all such pairs",
            )
        canvas = self.canvas(pair)
        place = crop, crop_seed(pair), canvas[0] / canvas[1]
        return cut_condition(condition, cut(condition.map, *place), _window(condition.map, *place))

    @torch.no_grad()
    def _encode_image(self, image: np.ndarray) -> np.ndarray:
        if self.base.vae is None:  # it was unloaded, but a cache entry proved damaged while training
            reload(self.base, "vae")
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self.base.device, self.base.vae.dtype) / 127.5 - 1
        return self.base.encode_image(x)[0].half().cpu().numpy()

    @torch.no_grad()
    def _encode_text(self, caption: str | None) -> Prompt:
        if self.base.text_encoder is None:
            reload(self.base, "text_encoder")
        if (
            self.encoded[1] is None or self.encoded[0] != caption
        ):  # features and pooled text are asked for one after the other
            self.encoded = caption, self.base.encode_text([caption])
        return self.encoded[1]

    def _hash(self, pair: Pair, file: Path) -> str:
        return pair.digest(file, self.cache.file_hash) if self.cache.folder else ""

    def batch(self, k: int, process: int = 0, processes: int = 1) -> list[Batch]:
        """Batch k, or the part of it that belongs to one of several processes, as a batch for each size of canvas. On
        the CPU, float32."""
        own = self.config.batch_size // processes
        by_size: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for slot in range(process * own, (process + 1) * own):
            sample = self._sample(k, slot)
            by_size.setdefault(sample["condition"].shape, []).append(sample)
        return [self._collate(samples) for samples in by_size.values()]

    def _sample(self, k: int, slot: int) -> dict[str, Any]:
        epoch, number, pair = self.order.at(k, slot)
        rng = np.random.default_rng([self.config.seed, epoch, number])
        crop = int(rng.integers(self.config.crops))
        flip = bool(rng.random() < 0.5) and self.config.flip
        dropped = rng.random() < self.config.prompt_dropout
        t = int(rng.integers(self.base.scheduler.config.num_train_timesteps))
        caption = None if dropped else caption_of(pair, flip)
        return self._draw(pair, crop, flip, caption, t, rng)

    def _draw(
        self, pair: Pair, crop: int, flip: bool, caption: str | None, t: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        moments = self.moments(pair, crop, flip)
        shape = (2, self.base.channels, *moments.shape[1:])
        noise = rng.standard_normal(shape, dtype=np.float32)
        return {
            "moments": moments,
            "noise": noise,
            "t": t,
            "caption": caption,
            "condition": self.condition(pair, crop, flip),
        }

    def _collate(self, samples: list[dict[str, Any]]) -> Batch:
        noise = torch.from_numpy(np.stack([s["noise"] for s in samples]))
        moments = torch.from_numpy(np.stack([s["moments"] for s in samples])).float()
        return Batch(
            z0=self.base.latents(moments, noise[:, 0]),
            eps=noise[:, 1].contiguous(),
            t=torch.tensor([s["t"] for s in samples]),
            prompt=self.prompt([s["caption"] for s in samples], samples[0]["condition"].shape[1::-1]),
            condition=torch.stack([condition_tensor(s["condition"]) for s in samples]),
        )

    def validation(self) -> list[tuple[Batch, Tensor]]:
        """Fixed batches of these pairs, each with the conditions of other pairs: empty prompts, VALIDATION_TIMES evenly
        placed timesteps per pair, centre crops."""
        count = self.base.scheduler.config.num_train_timesteps
        samples = []
        for place in range(VALIDATION_TIMES):
            for index, pair in enumerate(self.pairs):
                rng = np.random.default_rng([self.config.seed, 2**31, place, index])
                t = int((place + rng.random()) / VALIDATION_TIMES * count)
                samples.append(self._draw(pair, 0, False, None, t, rng))
        # A sample's neighbour in the list is of another pair, also where the next timestep begins.
        others = [s["condition"] for s in samples[1:] + samples[:1]]
        batches = []
        for i in range(0, len(samples), self.config.batch_size):
            part = slice(i, i + self.config.batch_size)
            batches.append((self._collate(samples[part]), torch.stack([condition_tensor(c) for c in others[part]])))
        return batches


def caption_of(pair: Pair, flip: bool) -> str:
    return flip_words(pair.caption) if flip else pair.caption


def _array(row: Tensor | None) -> np.ndarray:
    """A row (1, ...) in the form that the cache keeps: (...) float16."""
    assert row is not None
    return row[0].half().cpu().numpy()


def check_command(folder: Path | str, kind: str) -> str:
    """The command that checks training data."""
    return f"controlnet dataset check {quote(str(folder))}" + (f" --kind {quote(kind)}" if kind else "")


def crop_seed(pair: Pair) -> int:
    """The seed of a pair's random crops: from its name only, so other data does not change them."""
    return zlib.crc32(pair.name.encode())


def cut(image: np.ndarray, crop: int, place: int, aspect: float = 1.0) -> np.ndarray:
    """Crop number `crop` of a picture (H, W, 3), with `aspect` as its width / height: 0 is the centre one, the others
    are fixed by (crop, place). A crop is computed in fractions of the picture, so that a picture and a condition of
    different sizes are cut alike."""
    height, width = image.shape[:2]
    x, y, part, _ = _window(image, crop, place, aspect)
    left, top, wide = round(x * width), round(y * height), round(part * width)
    return np.ascontiguousarray(image[top : top + round(wide / aspect), left : left + wide])


def _window(image: np.ndarray, crop: int, place: int, aspect: float) -> tuple[float, float, float, float]:
    """Left, top, width and height of that crop, as fractions of the picture."""
    height, width = image.shape[:2]
    rng = np.random.default_rng([crop, place])
    zoom, x, y = (1.0, 0.5, 0.5) if crop == 0 else (rng.uniform(1, ZOOM), rng.random(), rng.random())
    high = min(height, width / aspect) / zoom
    wide = high * aspect
    return (width - wide) * x / width, (height - high) * y / height, wide / width, high / height
