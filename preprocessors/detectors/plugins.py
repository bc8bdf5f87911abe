"""Detectors of other packages. A package names them in its own pyproject.toml,

    [project.entry-points."controlnet.detectors"]
    anything = "its_package:ROWS"

where ROWS is a list of `Detector` rows (detector.py), and with them `Kind` rows (kinds.py) for kinds that are new and
`Weights` rows (weights.py) for what they fetch. They are looked for when a kind or detector is asked for that is not in
the table, and when the table is shown.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from controlnet.preprocessors.detectors.detector import Detector, Table
from controlnet.preprocessors.errors import reason
from controlnet.preprocessors.kinds import KINDS, Kind
from controlnet.preprocessors.weights import WEIGHTS, Weights

GROUP = "controlnet.detectors"


def add_all(table: Table) -> list[str]:
    """Add the rows of all plug-ins to the tables. Returns what is wrong with those that cannot be added; the others
    are."""
    wrong = []
    for point in entry_points(group=GROUP):
        try:
            _add(point, table)
        except Exception as error:  # whatever another package raises
            package = point.dist.name if point.dist else point.value
            wrong.append(f"plug-in {point.name} of {package} is left out: {reason(error)}")
    return wrong


def _add(point: EntryPoint, table: Table) -> None:
    found: Any = point.load()
    rows = list(found) if isinstance(found, (list, tuple)) else [found]
    if strange := [row for row in rows if not isinstance(row, (Detector, Kind, Weights))]:
        raise TypeError(f"{point.value} holds {strange[0]!r}, expected rows of Detector, Kind and Weights")

    # All is looked at before any is added: a plug-in is there or not.
    taken = [row.title for row in rows if isinstance(row, Detector) and row.name in table.get(row.kind, {})]
    taken += [row.name for row in rows if isinstance(row, Kind) and row.name in KINDS]
    taken += [row.name for row in rows if isinstance(row, Weights) and row.name in WEIGHTS]
    if taken:
        raise ValueError(f"{taken[0]} is in the table already")
    for row in rows:
        if isinstance(row, Detector):
            table.setdefault(row.kind, {})[row.name] = row
        elif isinstance(row, Kind):
            KINDS[row.name] = row
        else:
            WEIGHTS[row.name] = row
