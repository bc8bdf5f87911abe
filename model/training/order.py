"""In which order training takes pairs: fixed by the seed, the same in one process and in several, and at once at any
batch, so that a resumed run goes on with the very next one.

Folders are shuffled as a whole. A stream is read in lanes: a batch takes the same number of pairs from each lane, each
lane has shards of its own in each epoch, and a shard is shuffled by itself. So a process reads only the shards of its
part of the batch.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Protocol

import numpy as np
from controlnet.preprocessors.data.pair import Pair
from controlnet.preprocessors.data.stream import Shard, Stream
from controlnet.preprocessors.errors import InputError, OutputError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import object_or_empty

MOST_LANES = 64
"""Shards that are open at once, in all processes together."""

NEAR = 10_000
"""Pairs of a lane that are rather passed over than found anew."""

Size = tuple[int, int]


class Order(Protocol):
    """What training takes when."""

    def at(self, k: int, slot: int) -> tuple[int, int, Pair]:
        """(epoch, number, pair) of a place in batch k. The number tells a pair from others, and with the epoch fixes
        all that is random in the sample."""


class Shuffled:
    """All pairs of a folder, in another order in each epoch."""

    def __init__(self, pairs: Sequence[Pair], seed: int, batch_size: int):
        self.pairs, self.seed, self.batch_size = pairs, seed, batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def at(self, k: int, slot: int) -> tuple[int, int, Pair]:
        epoch, place = divmod(k * self.batch_size + slot, len(self.pairs))
        index = int(self._order_of(epoch)[place])
        return epoch, index, self.pairs[index]

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = epoch, shuffled(len(self.pairs), self.seed, epoch)
        return self._order[1]


class Bucketed:
    """The pairs of a folder in batches of one size each. In each epoch a size's pairs are shuffled; what is left of
    them after its last whole batch is filled up from its first ones."""

    def __init__(self, pairs: Sequence[Pair], sizes: Sequence[Size], seed: int, batch_size: int):
        self.pairs, self.sizes, self.seed, self.batch_size = pairs, sizes, seed, batch_size
        counts: dict[Size, int] = defaultdict(int)
        for size in sizes:
            counts[size] += 1
        self.batches = sum(-(-number // batch_size) for number in counts.values())
        """Batches in an epoch."""
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    def at(self, k: int, slot: int) -> tuple[int, int, Pair]:
        epoch, number = divmod(k, self.batches)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._batches_of(epoch)
        index = int(self._epoch[1][number, slot])
        return epoch, index, self.pairs[index]

    def _batches_of(self, epoch: int) -> np.ndarray:
        """(batches, batch_size) indices of pairs."""
        members: dict[Size, list[int]] = defaultdict(list)
        for index in shuffled(len(self.pairs), self.seed, epoch):
            members[self.sizes[index]].append(index)
        rows = []
        for size in sorted(members):
            whole = -(-len(members[size]) // self.batch_size) * self.batch_size
            rows.append(np.resize(members[size], whole).reshape(-1, self.batch_size))
        batches = np.concatenate(rows)
        return batches[shuffled(len(batches), self.seed, epoch, 1)]


class Lanes:
    """The pairs of a stream. `counts` is a file that remembers how many pairs the shards have, so that a resumed run
    finds its place without reading what it has seen."""

    def __init__(self, stream: Stream, seed: int, batch_size: int, counts: Path | None = None):
        most = min(len(stream.shards), MOST_LANES, batch_size)
        number = next(n for n in range(most, 0, -1) if batch_size % n == 0)
        self.per_lane = batch_size // number
        self.known = _Counts(counts, sorted(stream.held_out))
        self.lanes = [_Lane(stream, seed, i, number, self.known) for i in range(number)]

    def at(self, k: int, slot: int) -> tuple[int, int, Pair]:
        lane, place = divmod(slot, self.per_lane)
        epoch, key, pair = self.lanes[lane].take(k * self.per_lane + place)
        return epoch, zlib.crc32(key.encode()), pair


class _Lane:
    """Every `lanes`-th shard of each epoch's order."""

    def __init__(self, stream: Stream, seed: int, number: int, lanes: int, counts: _Counts):
        self.stream, self.seed, self.number, self.lanes, self.counts = stream, seed, number, lanes, counts
        self.next = -1
        self.rows: Iterator[tuple[int, str, Pair]] = iter(())

    def take(self, n: int) -> tuple[int, str, Pair]:
        """(epoch, key, pair) of the lane's pair n, counted from the beginning of the run."""
        if 0 <= self.next <= n < self.next + NEAR:  # what is between is another process's
            for _ in range(n - self.next):
                next(self.rows)
        else:
            self.rows = self._from(n)
        self.next = n + 1
        return next(self.rows)

    def _from(self, n: int) -> Iterator[tuple[int, str, Pair]]:
        for epoch in count():
            shards = self._shards_of(epoch)
            for i, shard in enumerate(shards):
                known = self.counts.get(shard.name)
                if known is not None and n >= known:
                    n -= known
                    continue
                for following in shards[i + 1 : i + 2]:
                    following.prefetch()
                own = 0
                for number, whole in enumerate(shard.groups()):
                    group = self.stream.to_train_on(whole)
                    place = zlib.crc32(shard.name.encode()), number
                    for index in islice(shuffled(len(group), self.seed, epoch, *place), n, None):
                        yield epoch, *group[index]
                    n, own = max(0, n - len(group)), own + len(group)
                self.counts.set(shard.name, own)
            if not any(self.counts.get(shard.name) != 0 for shard in self.stream.shards):
                raise InputError(f"{self.stream.folder}: all its pairs are held out, none is left", "more shards")

    def _shards_of(self, epoch: int) -> list[Shard]:
        order = shuffled(len(self.stream.shards), self.seed, epoch)
        return [self.stream.shards[i] for i in order[self.number :: self.lanes]]


class _Counts:
    """How many pairs each shard has to train on."""

    def __init__(self, path: Path | None, held_out: list[str]):
        self.path, self.held_out = path, zlib.crc32(json.dumps(held_out).encode())
        self.counts = self._kept()

    def get(self, name: str) -> int | None:
        return self.counts.get(name)

    def set(self, name: str, number: int) -> None:
        if self.counts.get(name) == number:
            return
        if self.path is not None:
            self.counts |= self._kept()  # what other processes have counted
        self.counts[name] = number
        if self.path is not None:
            try:
                write_file(self.path, json.dumps({"held_out": self.held_out, "counts": self.counts}).encode())
            except OutputError:  # it only saves time
                self.path = None

    def _kept(self) -> dict[str, int]:
        try:
            kept = object_or_empty(self.path.read_bytes()) if self.path else {}
        except OSError:
            return {}
        counts = kept.get("counts")
        return counts if kept.get("held_out") == self.held_out and isinstance(counts, dict) else {}


def shuffled(number: int, *seed: int) -> np.ndarray:
    """The numbers below `number` in an order that the seed fixes."""
    return np.random.default_rng(seed).permutation(number)


def bucket_of(picture: Size, size: int, step: int = 64) -> Size:
    """The size (width, height) in multiples of `step`, with at most size x size pixels and sides from half to twice
    `size`, whose aspect is nearest to a picture's; of equal ones the one with most pixels. For size 512 and step 64
    these are 512 x 512, 576 x 448, 640 x 384, ... (Novel AI's aspect ratio bucketing, 2022)."""
    aspect = picture[0] / picture[1]
    sides = range(step * max(1, size // 2 // step), 2 * size + 1, step)
    fitting = {}
    for width in sides:
        height = min(size * size // width // step * step, 2 * size)
        if height >= sides[0]:
            fitting[width, height] = True
    if not fitting:  # smaller than a step
        return size, size
    fitting |= {(height, width): True for width, height in fitting}
    return min(fitting, key=lambda s: (abs(np.log(s[0] / s[1] / aspect)), -s[0] * s[1]))
