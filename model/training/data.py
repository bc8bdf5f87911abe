"""The data of a run, checked before it begins and again before it is resumed."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.model.training.cache import Cache, key_of
from controlnet.model.training.config import TrainConfig
from controlnet.model.training.order import Lanes, Order
from controlnet.model.training.report import read_run
from controlnet.model.training.samples import Samples
from controlnet.preprocessors.data.check import LEAST_PAIRS
from controlnet.preprocessors.data.pair import Pair, Pairs, Source
from controlnet.preprocessors.data.stream import Stream
from controlnet.preprocessors.doubts import doubts
from controlnet.preprocessors.errors import InputError, UsageError
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.kinds import kind_named
from controlnet.preprocessors.weights import cache_folder

FREE_TO_CHANGE = {
    "max_steps", "minutes", "save_every", "keep", "log_every", "validate_every", "pictures", "cache", "tensorboard",
    "gradient_checkpointing",
}  # fmt: skip
"""Settings that a resumed run may change, since the optimisation does not depend on them. If the learning rate decays,
it also depends on the length of the run, which may then not change."""
NETWORK = ("copy", "hint")
"""Settings that make another network, which cannot go on from the one that was trained, not even by force."""


def split(found: Source, config: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs), by the data's own split. If it holds out fewer than the settings ask for, more
    are drawn from the seed, because on three pairs chance looks like control. Of a stream both are among its first
    pairs, and it learns which ones are held out."""
    if isinstance(found, Stream):
        return _split_stream(found, config)
    if len(found.pairs) < LEAST_PAIRS:
        raise InputError(
            f"{found.folder}: {len(found.pairs)} of at least {LEAST_PAIRS} pairs; hundreds are better",
            f"controlnet dataset check {found.folder}",
        )
    own = [index for index, pair in enumerate(found.pairs) if pair.held_out]
    by_chance = np.random.default_rng(config.seed).permutation(len(found.pairs)).tolist()
    # A picture with several captions is several pairs: held out are all of them, and one is looked at.
    of_picture: dict[Path, int] = {}
    for index in own + by_chance:
        of_picture.setdefault(found.pairs[index].image, index)
    count = max(2, min(config.held_out, len(of_picture) // 4))
    chosen = set(list(of_picture.values())[:count])
    hidden = {found.pairs[index].image for index in [*own, *chosen]}
    pairs = [pair.of_kind(config.kind) for pair in found.pairs]
    training = [pair for pair in pairs if pair.image not in hidden]
    if not training:
        raise InputError(f"{found.folder}: all its pictures are held out, none is left to train on", "split: train")
    return training, [pair for index, pair in enumerate(pairs) if index in chosen]


def _split_stream(stream: Stream, config: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """The first pairs of a stream, those out of its own split first; the others by their keys' hashes."""
    head = sorted(stream.head, key=lambda one: (not one[1].held_out, zlib.crc32(one[0].encode())))
    if len(head) < LEAST_PAIRS:
        raise InputError(f"{stream.folder}: {len(head)} of at least {LEAST_PAIRS} pairs", "hundreds are better")
    count = max(2, min(config.held_out, len(head) // 4))
    stream.held_out, stream.kind = {key for key, _ in head[:count]}, config.kind
    training = [pair for _, pair in stream.to_train_on(stream.head)]
    return training, [pair.of_kind(config.kind) for _, pair in head[:count]]


def order_of(found: Source, config: TrainConfig) -> Order | None:
    """The order of a stream that has been split; None for pairs that are all known, whose order `Samples` makes."""
    if not isinstance(found, Stream):
        return None
    counts = cache_folder() / "stream" / f"{key_of(found.marks())[:16]}.json"
    return Lanes(found, config.seed, config.batch_size, counts)


def look_at(sets: Sequence[Samples], strict: bool, warn: Callable[[str], None], check: str) -> dict[str, float]:
    """Facts about the first conditions: their mean brightness if they are line maps, and how much they differ. Warns of
    what looks wrong. Raises InputError when all are one flat colour, and for any doubt when strict. `check` is the
    command that checks the data.
    """
    maps = [s.condition(pair, 0, False) for s in sets for pair in s.pairs[:16]]
    lines = kind_named(sets[0].config.kind).is_lines
    squares = [fit(m, (sets[0].size, sets[0].size), "stretch").astype(np.float32) for m in maps]
    spread = float(np.stack(squares).std(0).mean() / 255)
    if all(int(m.max()) - int(m.min()) < 8 for m in maps):
        inverted = lines and np.mean([m.mean() for m in maps]) > 127
        raise InputError(
            "nothing to learn: every condition is "
            + ("white; lines must be white on black, these are inverted" if inverted else "one flat colour"),
            check,
        )
    found = [doubt for m in maps for doubt in doubts(m, sets[0].config.kind)]
    if np.mean([m.mean() for m in maps]) <= 127:  # on a small canvas, some dense but correct line maps are mostly white
        found = [doubt for doubt in found if doubt.what != "inverted lines"]
    for what, number in Counter(doubt.what for doubt in found).items():
        doubt = next(d for d in found if d.what == what)
        text = f"{number} of the first {len(maps)} conditions: {what} ({doubt.text})"
        if strict:
            raise InputError(text, doubt.cure)
        warn(f"{text}; {doubt.cure}")
    facts = {"condition_spread": round(spread, 4)}
    if lines:
        facts["line_map_brightness"] = round(float(np.mean([m.mean() for m in maps]) / 255), 4)
    return facts


def fingerprint(found: Source, hashes: Cache) -> dict[str, str]:
    """A sha256 for each part of the data: file names, captions, the held-out split, contents of the files. Of a stream
    only names and sizes of its shards count."""
    if isinstance(found, Stream):
        return {"shards": key_of([[name, size] for name, size, *_ in found.marks()])}
    assert isinstance(found, Pairs)
    parts: dict[str, list] = {"file names": [], "captions": [], "held-out split": [], "contents": []}
    for pair in found.pairs:
        files = [p for p in (pair.image, pair.condition) if p]
        parts["file names"].append([str(p).removeprefix(f"{found.folder}/") for p in files])
        parts["captions"].append(pair.caption)
        parts["held-out split"].append(pair.held_out)
        parts["contents"].append([hashes.file_hash(p) for p in files])
    hashes.remember()
    return {name: key_of(values) for name, values in parts.items()}


def check_resumed(folder: Path, record: dict[str, Any], force: bool) -> None:
    """Raises UsageError saying what differs from the run to be resumed, unless `force` is set."""
    before = read_run(folder).record
    settings = asdict(TrainConfig()) | before["settings"]  # settings that are newer than the run had their defaults
    free = FREE_TO_CHANGE - ({"max_steps", "minutes"} if record["settings"]["decay_fraction"] else set())
    changes = [
        f"{name} was {settings[name]!r}, is {value!r}"
        for name, value in record["settings"].items()
        if name not in free and settings[name] != value
    ]
    if others := [name for name in NETWORK if settings[name] != record["settings"][name]]:
        raise UsageError(
            f"{folder}: {others[0]} was {settings[others[0]]!r}, is {record['settings'][others[0]]!r}: another network",
            "start anew without --resume",
        )
    if before["base_sha256"] != record["base_sha256"]:
        changes.append(f"the weights of base {record['settings']['base']} are others")
    then, now = before["data"], record["data"]
    if then.get("held_out", now["held_out"]) != now["held_out"]:
        changes.append(f"{then['held_out']} pairs were held out, now {now['held_out']}")
    if others := [name for name, digest in now["sha256"].items() if then["sha256"].get(name) != digest]:
        count = f" ({then['pairs']} pairs then, {now['pairs']} now)" * (then["pairs"] != now["pairs"])
        changes.append(f"the data's {', '.join(others)} changed{count}")
    if changes and not force:
        raise UsageError(
            f"{folder}: cannot go on as it was: " + "; ".join(changes),
            "--force goes on all the same; or start anew without --resume",
        )
