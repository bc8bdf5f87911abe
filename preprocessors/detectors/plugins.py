"""Detectors of other packages. A package names them in its own pyproject.toml,

    [project.entry-points."controlnet.detectors"]
    anything = "its_package:ROWS"

where ROWS is a list of `Detector` rows (detector.py), and with them `Kind` rows (kinds.py) for kinds that are new and
`Weights` rows (weights.py) for what they fetch. They are looked for when a kind or detector is asked for that is not in
the table, and when the table is shown.
"""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from controlnet.preprocessors.detectors.detector import Detector, Table
from controlnet.preprocessors.errors import reason
from controlnet.preprocessors.kinds import KINDS, Kind
from controlnet.preprocessors.weights import WEIGHTS, Weights

GROUP = "controlnet.detectors"
Row = Detector | Kind | Weights


RESERVED = {
    "inputs", "out", "as_json", "json", "size", "resize", "recursive", "overwrite", "skip_existing", "preview", "quiet",
    "shard", "processes", "ray", "every", "steady", "detector", "weights", "offline", "keypoints", "device", "dtype",
    "show", "verbose", "log", "help",
}  # fmt: skip
"""Flags of `detect`, which no option may be named like."""


def add_all(table: Table) -> list[str]:
    """Add the rows of all plug-ins to the tables. Returns what is wrong with those that cannot be added; the others
    are."""
    wrong = []
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else point.value
        try:
            with redirect_stdout(sys.stderr):  # what is printed there is not a result
                rows = _rows(point)
                _check(rows, table)
                _add([replace(row, plugin=package) if isinstance(row, Detector) else row for row in rows], table)
        except (Exception, SystemExit) as error:  # whatever another package raises
            wrong.append(f"plug-in {point.name} of {package} is left out: {reason(error)}")
    return wrong


def _rows(point: EntryPoint) -> list[Row]:
    found: Any = point.load()
    rows = list(found) if isinstance(found, (list, tuple)) else [found]
    if strange := [row for row in rows if not isinstance(row, Row)]:
        raise TypeError(f"{point.value} holds {strange[0]!r}, expected rows of Detector, Kind and Weights")
    return rows


def _check(rows: list[Row], table: Table) -> None:
    """Raises an error for what would fail later: a plug-in is added whole or not at all."""
    detectors = [row for row in rows if isinstance(row, Detector)]
    taken = [row.title for row in detectors if row.name in table.get(row.kind, {})]
    taken += [row.name for row in rows if isinstance(row, Kind) and row.name in KINDS]
    taken += [row.name for row in rows if isinstance(row, Weights) and row.name in WEIGHTS]
    if taken:
        raise ValueError(f"{taken[0]} is in the table already")
    titles = [row.title for row in detectors]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"two detectors {twice[0]}")
    weights = {*WEIGHTS, *(row.name for row in rows if isinstance(row, Weights))}
    for row in detectors:
        for name in (row.kind, row.name):
            if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == "all":
                raise ValueError(f"{name!r}: a kind or detector is named by small letters, digits, - and _, not all")
        if missing := set(row.weights) - weights:
            raise ValueError(f"{row.title}: no weights {', '.join(sorted(missing))} in the tables")
        _check_options(row)


def _check_options(row: Detector) -> None:
    options = row.load_options()
    if not (isinstance(options, type) and is_dataclass(options)):
        raise TypeError(f"{row.options}: expected a dataclass")
    options()  # all have defaults, and these are allowed
    for field in fields(options):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "?")
        if kind not in ("int", "float", "bool", "str"):
            raise TypeError(f"{row.options}: {field.name} is {kind}, expected int, float, bool or str")
        if field.name in RESERVED:
            raise ValueError(f"{row.options}: {field.name} is a flag of detect")


def _add(rows: list[Row], table: Table) -> None:
    for row in rows:
        if isinstance(row, Detector):
            table.setdefault(row.kind, {})[row.name] = row
        elif isinstance(row, Kind):
            KINDS[row.name] = row
        else:
            WEIGHTS[row.name] = row
