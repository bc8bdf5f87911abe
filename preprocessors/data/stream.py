"""Training data that fits no disk: shards, read one after the other in an order that a seed fixes.

    data/{000..999}.tar  https://host/{000..999}.tar  s3://bucket/data/*.tar     tar files as WebDataset has them
    data/*.parquet  hf://datasets/user/name                                      tables that `datasets` reads

A shard of a URL is copied to this machine, used and removed; of a table some hundred rows are in memory. So the memory
and the disk that are used do not grow with the data.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from controlnet.preprocessors.data.forms import CONDITION_COLUMNS, HELD_OUT, pairs_in, split_of_row, unfinished
from controlnet.preprocessors.data.pair import HeldPair, Pair, Pairs
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.data.rows import caption_of
from controlnet.preprocessors.errors import InputError, UsageError, reason
from controlnet.preprocessors.jsons import object_or_empty
from controlnet.preprocessors.remote import is_url, place
from controlnet.preprocessors.tars import forget, local_copy

IMAGE_COLUMNS = ("image", "target", "picture", "jpg", "png", "webp")
HUB = "hf://datasets/"
ROWS = 256
"""Rows of a table that are in memory at once, and shuffled among each other."""
HEAD = 64
"""Pairs that are looked at before training begins."""


class Shard(Protocol):
    """A part of a stream."""

    @property
    def name(self) -> str:
        """The same on every machine."""

    def mark(self) -> list:
        """Its size, or what else is known of it from afar, and then more that changes with its content. Raises
        InputError if it is not there."""

    def groups(self) -> Iterator[list[tuple[str, Pair]]]:
        """(key, pair) of all its pairs, in groups small enough for the memory; a group's pairs can be read until the
        next group is asked for. Raises InputError."""

    def prefetch(self) -> None:
        """Begin to bring it here, in the background."""


class TarShard:
    """A tar file on this machine or behind a URL."""

    def __init__(self, name: str):
        self.name = name
        self.coming: Future[Path] | None = None

    def mark(self) -> list:
        try:
            stat = place(self.name).stat()
            return [stat.st_size, *([] if is_url(self.name) else [stat.st_mtime_ns])]
        except OSError as error:
            raise InputError(
                f"{self.name}: no such shard ({reason(error)})", "look at the names of the shards"
            ) from None

    def prefetch(self) -> None:
        if is_url(self.name) and self.coming is None:
            self.coming = _fetchers().submit(local_copy, self.name)

    def groups(self) -> Iterator[list[tuple[str, Pair]]]:
        self.prefetch()
        coming, self.coming = self.coming, None  # each reader has a copy of its own
        path = coming.result() if coming is not None else Path(self.name)
        try:
            pairs, _ = pairs_in(path)
            yield [(str(pair.image).removeprefix(str(path.parent)), pair) for pair in pairs]
        finally:
            forget(path)
            if coming is not None:
                shutil.rmtree(path.parent, ignore_errors=True)


@cache
def _fetchers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="shards")


class TableShard:
    """One of the shards in which `datasets` reads a table."""

    def __init__(self, name: str, table: Any, number: int):
        self.name, self.table, self.number = f"{name}#{number}", table, number

    def mark(self) -> list:
        return [self.name]

    def prefetch(self) -> None:
        pass  # the library reads ahead

    def groups(self) -> Iterator[list[tuple[str, Pair]]]:
        rows = iter(self.table.shard(num_shards=self.table.num_shards, index=self.number))
        count = 0
        while True:
            try:
                group = list(islice(rows, ROWS))
            except Exception as error:  # the library's readers raise a dozen types
                raise InputError(
                    f"{self.name}: row {count} or one after it: {reason(error)}", "fetch it again"
                ) from error
            if not group:
                return
            keys = [f"{self.name}-{count + i}" for i in range(len(group))]
            yield [(key, _pair_of(row, key)) for key, row in zip(keys, group, strict=True)]
            count += len(group)


def _pair_of(row: dict[str, Any], key: str) -> Pair:
    """The pair in a row of a table. Raises InputError for a row without a picture."""
    files: dict[Path, bytes] = {}

    def file_in(columns: Sequence[str], what: str) -> Path | None:
        cell = next((row[column] for column in columns if row.get(column) is not None), None)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None and isinstance(cell, dict) and cell.get("path"):
            data = place(cell["path"]).read_bytes()
        if not isinstance(data, bytes):
            return None
        own = cell.get("path") if isinstance(cell, dict) else None
        path = Path(key) / what / Path(own or what).name  # a file's own name may say its kind
        files[path] = data
        return path

    image = file_in(IMAGE_COLUMNS, "image")
    if image is None:
        raise InputError(
            f"{key}: no picture in its columns {', '.join(row)}", f"expected one of {', '.join(IMAGE_COLUMNS)}"
        )
    condition = file_in((*CONDITION_COLUMNS, "condition", "source", "conditioning_image.png"), "condition")
    return HeldPair(image, condition, caption_of(row, key), split_of_row(row), files=files)


@dataclass
class Stream:
    """Shards, and the first pairs of the first one. What training must not see is known by its keys."""

    folder: str
    form: str
    shards: list[Shard]
    held_out: set[str] = field(default_factory=set)
    kind: str = ""
    """Of the conditions that are read, where a sample has several."""
    manifest: dict = field(default_factory=dict)
    """What lies beside the shards says of them, as `dataset build --to` writes it."""
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @cached_property
    def head(self) -> list[tuple[str, Pair]]:
        """(key, pair) of the first pairs. Raises InputError if there is none."""
        pairs = (one for shard in self.shards for group in shard.groups() for one in map(_kept, group))
        first = list(islice(pairs, HEAD))
        pairs.close()
        if not first:
            raise InputError(f"{self.folder}: no pairs in its {len(self.shards)} shards", "tar -tf SHARD lists one")
        return first

    @property
    def pairs(self) -> list[Pair]:
        return [pair for _, pair in self.head]

    def to_train_on(self, group: list[tuple[str, Pair]]) -> list[tuple[str, Pair]]:
        """Those of a shard's pairs that are not held out. Where the first pairs have conditions, one without is left
        out, as one without a picture is."""
        paired = self.pairs[0].condition is not None
        return [
            (key, pair.of_kind(self.kind))
            for key, pair in group
            if key not in self.held_out and not pair.held_out and (pair.condition is not None or not paired)
        ]

    def marks(self) -> list[list]:
        """The name and the mark of each shard. Raises InputError for one that is not there."""
        with ThreadPoolExecutor(32) as pool:  # servers are asked many questions at once
            return list(pool.map(lambda shard: [shard.name, *shard.mark()], self.shards))


def _kept(one: tuple[str, Pair]) -> tuple[str, Pair]:
    """A pair with its files in memory, which stays readable when its shard is gone."""
    key, pair = one
    files = {file: pair.read(file) for file in (pair.image, pair.condition, *pair.maps) if file is not None}
    return key, HeldPair(pair.image, pair.condition, pair.caption, pair.held_out, pair.maps, files)


def is_stream(name: str) -> bool:
    """Whether a name of training data means a stream: a URL, a pattern of shards, or one shard."""
    return is_url(name) or (name.endswith((".tar", ".parquet")) and not Path(name).is_dir())


def find_data(name: str) -> Pairs | Stream:
    """The training data behind a name: a stream, or what lies in a folder. Raises as `open_stream` and `find_pairs`
    do."""
    return open_stream(name) if is_stream(name) else find_pairs(Path(name))


def open_stream(name: str) -> Stream:
    """The stream behind a name. Raises InputError for shards that are not there, UsageError if a package is missing."""
    if name.startswith(HUB) and not name.endswith((".tar", ".parquet")):
        return _table(name, name.removeprefix(HUB))
    names = expand(name)
    held_out = {one for one in names if _is_held_out(one)}
    if len(held_out) == len(names):  # asked for by name
        held_out = set()
    names = [one for one in names if one not in held_out]
    left = tuple(f"{one} (held out, by its name)" for one in sorted(held_out))
    plain = name.partition("?")[0]
    if plain.endswith(".parquet"):
        files = [one if is_url(one) else glob.escape(one) for one in names]
        # Read by as many rows as are shuffled: left to itself, the library takes a file of none for damaged.
        table = _table(name, "parquet", data_files=files, batch_size=ROWS)
        return replace(table, manifest=(told := _manifest(names[0])), skipped=(*left, *unfinished(told)))
    if not plain.endswith(".tar"):
        raise UsageError(f"{name}: expected shards (.tar, .parquet) or {HUB}USER/NAME", "'https://host/{000..999}.tar'")
    told = _manifest(names[0])
    shards: list[Shard] = [TarShard(one) for one in names]
    return Stream(name, "webdataset", shards, manifest=told, skipped=(*left, *unfinished(told)))


def _is_held_out(shard: str) -> bool:
    """Whether the name of a shard begins with that of a held-out split: validation-00000-of-00001.parquet, test.tar."""
    name = shard.partition("?")[0].rpartition("/")[2]
    return re.split(r"[^a-z_]|_(?=\d)", name.lower())[0] in HELD_OUT


def _manifest(shard: str) -> dict:
    """manifest.json in the folder of a shard; empty if there is none."""
    path = place(shard.partition("?")[0]).parent / "manifest.json"
    try:
        return object_or_empty(path.read_bytes())
    except Exception:  # each client has its own types, and it need not be there
        return {}


def _table(name: str, path: str, **options: Any) -> Stream:
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{name}: needs datasets", "pip install 'controlnet-toolkit[datasets]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told below
    try:
        table = datasets.load_dataset(path, split="train", streaming=True, **options)
        features = table.features or {}
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        count = table.num_shards
    except Exception as error:  # a dozen types, for the network, names, access and files
        raise InputError(f"{name}: {reason(error)}", "a name of huggingface.co/datasets, or Parquet files") from error
    return Stream(name, "parquet" if options else "datasets", [TableShard(name, table, i) for i in range(count)])


def expand(name: str) -> list[str]:
    """The names that a pattern means: {000..999}, {a,b} and, for what can be listed, *. Raises InputError if there is
    none, UsageError if the package that expands is missing."""
    names = [name]
    if "{" in name:
        try:
            from braceexpand import braceexpand
        except ImportError:
            raise UsageError(f"{name}: needs webdataset", "pip install 'controlnet-toolkit[webdataset]'") from None
        names = list(braceexpand(name))
    found = [one for pattern in names for one in (_listed(pattern) if "*" in pattern else [pattern])]
    if not found:
        raise InputError(f"{name}: no such shards", f"ls {re.split(r'[*{]', name)[0]}*")
    if not is_url(name) and (absent := [one for one in found if not Path(one).is_file()]):
        raise InputError(
            f"{len(absent)} of {len(found)} shards are missing, the first: {absent[0]}", "make or fetch them"
        )
    return found


def _is_pattern(name: str) -> bool:
    return "*" in name or (not is_url(name) and not Path(name).is_file() and bool(re.search(r"[\[?]", name)))


def _listed(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern))  # noqa: PTH207 - of the whole name, and as it was given
    before, _, name = pattern.rpartition("/")
    try:
        return sorted(str(path) for path in place(f"{before}/").glob(name))
    except OSError as error:
        raise InputError(f"{pattern}: {reason(error)}", "a server that lists its folders, or {000..999}") from error
