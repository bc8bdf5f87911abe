"""What control does, in pictures: sheets made by `tiny` from photos and from held-out scenes of its world.

    python examples/gallery.py [docs] [--person PHOTO]

Equal on the same machine each time: float32, fixed seeds. The photos come with scikit-image; of a person it has a
portrait alone, whose pose is drawn as if one had stepped back. --person takes a photo of a whole person instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from controlnet.model.control.modes import MODES
from controlnet.model.control.strength import Strength
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.registry import TINY
from controlnet.model.sampling.canvas import on_canvas
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.tiny.readers import pose_of, user_canny, user_depth
from controlnet.model.tiny.world.render import MAIN, render
from controlnet.model.tiny.world.scenes import make_scene
from controlnet.model.tiny.world.shards import HELD_OUT
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.sheet import contact_sheet
from controlnet.preprocessors.skeleton import cut_people, draw
from controlnet.preprocessors.stage_one import stage_one

Cells = list[tuple[np.ndarray, str]]
SCENES, SHOWN = 60, 3
"""Of so many held-out scenes, the ones of each sort whose main thing is largest are shown."""


class Studio:
    def __init__(self, person: Path | None):
        self.person = person
        self.base = load_base("tiny")
        self.size = self.base.native_size
        self.nets = {
            kind: load_controlnet(TINY / f"controlnet-{kind}", self.base.dtype) for kind in ("canny", "pose", "depth")
        }
        scenes = [make_scene(HELD_OUT + i) for i in range(SCENES)]
        drawn = render(scenes, self.size)
        large = (drawn.parts == MAIN).sum((1, 2)).argsort(descending=True).tolist()
        rows = [row for sort in ("objects", "person") for row in [r for r in large if scenes[r].sort == sort][:SHOWN]]
        self.shown = [scenes[row] for row in rows]
        self.pictures, self.joints = drawn.images[rows].numpy(), drawn.joints[rows].numpy()

    def condition(self, scene: int, kind: str) -> np.ndarray:
        if kind == "pose":
            return pose_of(self.joints[scene], self.size)
        return {"canny": user_canny, "depth": user_depth}[kind](self.pictures[scene])

    def of_photo(self, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """(a photo that comes with scikit-image, its map on the canvas)."""
        import skimage.data

        photo = getattr(skimage.data, name)()
        row = find_detector(kind)
        options = row.load_options()(**({"auto": True} if kind == "canny" else {}))
        return photo, on_canvas(stage_one(photo, row.ready(options)), (self.size, self.size)).map

    def of_person(self) -> tuple[np.ndarray, np.ndarray]:
        """(a photo of a person, their pose on the canvas)."""
        import skimage.data

        photo = read_image(self.person.read_bytes(), str(self.person))[0] if self.person else skimage.data.astronaut()
        square = fit(photo, (512, 512), "crop")
        people = stage_one(square, "pose").people or []
        people = people if self.person else cut_people(people, -0.5, -0.15, 2, 2)
        return square, draw(people, (self.size, self.size))

    def image(self, prompt: str, seed: int = 0, acting: dict[str, np.ndarray] | None = None, **strength) -> np.ndarray:
        acting = acting or {}
        nets = [(self.nets[kind], Strength(**strength)) for kind in acting]
        return next(generate(self.base, [Request(prompt, seed, tuple(acting.values()))], nets))


def prompts(studio: Studio) -> Cells:
    """One condition, six prompts."""
    pose = studio.condition(3, "pose")
    cells: Cells = [(studio.pictures[3], "a held-out scene"), (pose, "its pose")]
    texts = [
        studio.shown[3].caption, "a person standing in a red shirt and blue trousers, white floor, black wall",
        "a person standing in a yellow shirt and black trousers, blue floor, pink wall",
        "a person walking in a green shirt and white trousers, orange floor, cyan wall",
        "a person in a purple shirt and grey trousers, brown floor, white wall", "",
    ]  # fmt: skip
    return cells + [(studio.image(text, 1, {"pose": pose}), text or "(no prompt)") for text in texts]


def conditions(studio: Studio) -> Cells:
    """One prompt, six conditions."""
    text = "a person standing in a red shirt and blue trousers, grey floor, white wall"
    cells: Cells = []
    for scene in (3, 4, 5):
        for kind in ("pose", "canny"):
            condition = studio.condition(scene, kind)
            cells += [(condition, kind), (studio.image(text, 2, {kind: condition}), text)]
    return cells


def photos(studio: Studio) -> Cells:
    """From real photos: a pose, and edges and depth of what `tiny` has never seen."""
    asked = {
        ("rocket", "canny"): "a person standing in a white shirt and grey trousers, red floor, black wall",
        ("coffee", "depth"): "a large yellow cylinder, grey floor, green wall",
    }
    photo, pose = studio.of_person()
    text = "a person standing in a yellow shirt and blue trousers, green floor, white wall"
    cells: Cells = [(photo, "photo"), (pose, "pose"), (studio.image(text, 3, {"pose": pose}), text)]
    cells.append((studio.image(text, 3), "without control"))
    for (name, kind), text in asked.items():
        photo, condition = studio.of_photo(name, kind)
        cells += [(photo, name), (condition, kind), (studio.image(text, 3, {kind: condition}), text)]
        cells.append((studio.image(text, 3), "without control"))
    return cells


def composition(studio: Studio) -> Cells:
    """A pose and the depth of a scene, alone and added."""
    cells: Cells = []
    for scene in (3, 5):
        text = studio.shown[scene].caption
        both = {kind: studio.condition(scene, kind) for kind in ("pose", "depth")}
        cells += [(both["pose"], "pose"), (both["depth"], "depth")]
        for name in (("pose",), ("depth",), ("pose", "depth")):
            cells.append((studio.image(text, 4, {kind: both[kind] for kind in name}), " + ".join(name)))
    return cells


def scales(studio: Studio) -> Cells:
    condition, text = studio.condition(3, "pose"), studio.shown[3].caption
    cells: Cells = [(condition, text)]
    return cells + [
        (studio.image(text, 5, {"pose": condition}, scale=s), f"scale {s:g}") for s in (0, 0.25, 0.5, 0.75, 1, 1.5, 2)
    ]


def windows(studio: Studio) -> Cells:
    condition, text = studio.condition(1, "canny"), studio.shown[1].caption
    cells: Cells = [(condition, text)]
    for start, end in ((0, 1), (0, 0.25), (0, 0.5), (0, 0.75), (0.25, 1), (0.5, 1), (0.75, 1)):
        image = studio.image(text, 6, {"canny": condition}, start=start, end=end)
        cells.append((image, f"acts from {start:.0%} to {end:.0%}"))
    return cells


def weightings(studio: Studio) -> Cells:
    """Empty prompts: the map must do."""
    cells: Cells = []
    for scene, kind in ((0, "canny"), (4, "pose")):
        condition = studio.condition(scene, kind)
        cells.append((condition, f"{kind}, no prompt"))
        for name, mode in MODES.items():
            cells.append((studio.image("", 7, {kind: condition}, **asdict(mode)), f"--mode {name}"))
    return cells


SHEETS: dict[str, tuple[Callable[[Studio], Cells], int, str]] = {
    "photos": (photos, 4, "Photos to maps to images: `tiny` paints what it knows in that shape"),
    "prompts": (prompts, 4, "One condition, six prompts"),
    "conditions": (conditions, 6, "One prompt, six conditions"),
    "composition": (composition, 5, "Two conditions, alone and added"),
    "scales": (scales, 4, "A pose from scale 0 to 2"),
    "windows": (windows, 4, "Control in a part of the sampling"),
    "weightings": (weightings, 5, "No prompt: the four modes"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--person", type=Path, help="a photo of a whole person")
    parser.add_argument("--sheets", default=",".join(SHEETS))
    args = parser.parse_args()
    studio = Studio(args.person)
    page = ["# Gallery", "", "Made by `make gallery` with the embedded model, 20 steps, on a CPU.", ""]
    for name in args.sheets.split(","):
        cells, columns, title = SHEETS[name]
        picture = args.folder / "pictures" / f"gallery-{name}.png"
        write_file(picture, png_bytes(contact_sheet(cells(studio), columns, 192)))
        page += [f"## {title}", "", f"![{title}](pictures/{picture.name})", ""]
        print(picture, flush=True)
    page += ["## When control began", "", "![held-out pictures over the steps of a training](pictures/strip.png)", ""]
    write_file(args.folder / "gallery.md", "\n".join(page).encode())


if __name__ == "__main__":
    main()
