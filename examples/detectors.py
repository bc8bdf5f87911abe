"""Every detector whose weights are here, each on a photo that suits it: docs/pictures/detectors.jpg.

    python examples/detectors.py [--weights mlsd=FOLDER ...]

The photos come with scikit-image: an astronaut, a rocket (public domain), a cup of coffee, a cat (CC0).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.detectors.registry import DETECTORS
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.sheet import Cell, contact_sheet
from controlnet.preprocessors.stage_one import stage_one
from PIL import Image

SHEET = Path(__file__).parents[1] / "docs/pictures/detectors.jpg"
SIZE = (384, 384)
PHOTOS = {"pose": "astronaut", "mlsd": "rocket", "depth": "coffee", "normal": "coffee", "shuffle": "coffee",
          "inpaint": "astronaut", "recolor": "astronaut", "canny": "rocket", "softedge": "chelsea"}  # fmt: skip
"""Kind -> the photo that it is shown on; others are shown on OTHER."""
OTHER = "chelsea"
OPTIONS = {"tile": {"down": 8.0}}
"""Where the default options show little."""


def shown(condition: Condition) -> np.ndarray:
    """A map as it is looked at: what it hides is grey."""
    if condition.map.shape[-1] != 4:
        return condition.rgb
    return np.where(condition.map[..., 3:] > 0, condition.rgb, np.uint8(127))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FOLDER")
    given = {name: Path(folder) for name, folder in (one.split("=", 1) for one in parser.parse_args().weights)}
    cells: list[Cell] = []
    for kind, rows in DETECTORS.items():
        for row in rows.values():
            folder = given.get(row.weights[0]) if row.weights else None
            try:
                ready = row.ready(row.load_options()(**OPTIONS.get(kind, {})), folder, offline=True)
            except ControlNetError:
                continue  # its weights are not on this machine
            photo = getattr(skimage.data, PHOTOS.get(kind, OTHER))()
            if row.function.endswith(":invert"):
                photo = 255 - stage_one(photo, "lineart", SIZE).rgb  # a drawing
            condition = stage_one(photo, ready, SIZE)
            cells += [(fit(photo, SIZE), ""), (shown(condition), row.title)]
            print(row.title)
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(cells, 6)).save(SHEET, quality=85)
    print(SHEET)


if __name__ == "__main__":
    main()
