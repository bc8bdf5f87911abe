"""`controlnet score IMAGE --cond MAP`: how well an image keeps to its condition, found on the image again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from controlnet.cli.conditions import parse_condition
from controlnet.cli.options import Json, Offline, Overwrite, Quiet, check_png, keeps, say
from controlnet.preprocessors.errors import ControlNetError, Exit, InputError, UsageError, reason
from controlnet.preprocessors.jsons import dumps

if TYPE_CHECKING:
    import numpy as np

HELP = "Measure how well images keep to their conditions: lines by F1, depth by rank, poses by OKS."
SCORED = ("canny", "softedge", "scribble", "lineart", "depth", "pose")
MAIN = {"depth": "rank_correlation", "pose": "oks"}
"""The score of a kind that tells most; of lines it is f1_near."""
ASPECT = 0.05
"""Aspects of image and map may differ by so much (of 1)."""
RESAMPLES = 2000

Image = Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="An image that generate made, or any other.")]
Cond = Annotated[
    list[str] | None,
    typer.Option(
        "--cond", metavar="PATH[,kind=KIND]",
        help="The map it should keep to, or OpenPose's JSON; repeat for several. (default: the image's record's)",
    ),
]  # fmt: skip
JobsFile = Annotated[
    Path | None,
    typer.Option("--jobs", metavar="FILE", help='JSON Lines, {"image": ..., "cond": ...} each; means with intervals.'),
]
Overlay = Annotated[Path | None, typer.Option(metavar="FILE", help="Also a picture that shows where control failed.")]


@dataclass(frozen=True)
class Scored:
    """The scores of an image for one condition, and the maps that were compared, at the image's size."""

    kind: str
    scores: dict[str, float]
    condition: np.ndarray
    found: np.ndarray
    shown: np.ndarray
    """Where they agree and where not, (H, W, 3) uint8."""

    @property
    def main(self) -> float:
        return self.scores[MAIN.get(self.kind, "f1_near")]


def score(
    image: Image = None, cond: Cond = None, jobs: JobsFile = None, overlay: Overlay = None, as_json: Json = False,
    overwrite: Overwrite = False, offline: Offline = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    if (image is None) == (jobs is None):
        raise UsageError("give an image, or --jobs with a file of them", "controlnet score out/7-photo.png")
    if overlay is not None:
        if jobs is not None:
            raise UsageError("--overlay shows one image", "controlnet score IMAGE --overlay overlay.png")
        check_png("--overlay", overlay)
        keeps(overlay, overwrite, skip_existing=False)
    scorer = Scorer(offline)
    if jobs is not None:
        _score_jobs(scorer, jobs, as_json, quiet)
        return
    assert image is not None
    results = scorer.of_file(image, cond or [])
    if overlay is not None:
        _write_overlay(overlay, image, results)
    for path, one in results:
        if as_json:
            print(dumps({"image": image, "cond": path, "kind": one.kind, **_rounded(one.scores)}))
        else:
            print(f"{path} ({one.kind})")
            for name, value in one.scores.items():
                print(f"  {name.replace('_', ' '):18}{value:8.3f}")


def _score_jobs(scorer: Scorer, path: Path, as_json: bool, quiet: bool) -> None:
    """A line each, then the mean of every score with its 95 % bootstrap interval."""
    from controlnet.cli.bars import count_bar
    from controlnet.cli.jobs import read_jobs_file

    lines = read_jobs_file(path)
    values: dict[tuple[str, str], list[float]] = {}
    failed = 0
    with count_bar("scoring", len(lines), quiet) as on_item:
        for done, (where, given) in enumerate(lines, 1):
            try:
                if isinstance(given, UsageError):
                    raise given
                image, conditions = _line(given)
                for cond, one in scorer.of_file(image, conditions):
                    if as_json:
                        print(dumps({"image": image, "cond": cond, "kind": one.kind, **_rounded(one.scores)}))
                    for name, value in one.scores.items():
                        values.setdefault((one.kind, name), []).append(value)
            except ControlNetError as error:
                failed += 1
                say(f"error: {where}: {error}")
            on_item(done)
    for (kind, name), found in values.items():
        mean, low, high = interval(found)
        if as_json:
            row = {"kind": kind, "score": name, "n": len(found), "mean": mean, "low": low, "high": high}
            print(dumps(_rounded(row)))
        else:
            print(f"{kind:9} {name.replace('_', ' '):18}{mean:8.3f}   {low:.3f} to {high:.3f}   n {len(found)}")
    if failed:
        say(f"{failed} of {len(lines)} lines failed")
        raise typer.Exit(Exit.PARTIAL)


def _line(given: dict[str, Any]) -> tuple[str, list[str]]:
    if unknown := given.keys() - {"image", "cond"}:
        raise UsageError(f"unknown key {sorted(unknown)[0]!r}, expected image and cond", '{"image": "a.png"}')
    image, conditions = given.get("image"), given.get("cond") or []
    if not isinstance(image, str) or not image:
        raise UsageError("no image in it", '{"image": "out/7-photo.png", "cond": "photo.canny.png"}')
    conditions = [conditions] if isinstance(conditions, str) else conditions
    if not all(isinstance(c, str) for c in conditions):
        raise UsageError(f"cond: {conditions!r}, expected text or a list of texts", '"cond": "photo.canny.png"')
    return image, conditions


class Scorer:
    """Finds conditions on images again; each detector is loaded once."""

    def __init__(self, offline: bool):
        self.offline = offline
        self.make = cache(self._make)

    def of_file(self, path: str, conditions: list[str]) -> list[tuple[str, Scored]]:
        """(condition, its scores) of an image file. Raises InputError for conditions that do not fit the image."""
        from controlnet.preprocessors.images import read_bytes, read_image
        from controlnet.preprocessors.metadata import load

        image, text = read_image(read_bytes(path), path)
        if conditions:
            return [(cond, self.of(image, path, cond)) for cond in conditions]
        recorded = load(text).get("conditions", [])
        if not isinstance(recorded, list) or not all(isinstance(one, dict) for one in recorded):
            raise InputError(
                f"{path}: its record is not whole (conditions: {recorded!r})", "an image as generate wrote it"
            )
        if not recorded:
            raise InputError(f"{path}: its record names no condition", f"controlnet score {path} --cond MAP")
        return [self.of_record(image, path, condition) for condition in recorded]

    def of_record(self, image: np.ndarray, name: str, condition: dict) -> tuple[str, Scored]:
        """The scores for a condition of the image's own record; where it was made of a photo, it is made again."""
        from controlnet.preprocessors.images import read_bytes, read_image
        from controlnet.preprocessors.stage_one import detect, rgb

        path = _recorded_path(condition, name)
        made = condition.get("detect")
        if made is None:
            return path, self.of(image, name, f"{path},kind={condition['kind']}")
        photo, _ = read_image(read_bytes(path), path)
        make = self.make(made["kind"], made["detector"], json.dumps(made["options"]))
        map_, found = detect(photo, make, tuple(made["size"]), made["resize"])
        return path, self.compare(image, rgb(map_), condition["kind"], made | found, path, name)

    def of(self, image: np.ndarray, name: str, cond: str) -> Scored:
        """The scores of an image (H, W, 3) uint8 for one condition, PATH[,kind=KIND]."""
        from controlnet.preprocessors.images import read_bytes, read_image
        from controlnet.preprocessors.keypoints import draw_json
        from controlnet.preprocessors.metadata import kind_of, load

        flag = parse_condition(cond)
        size = (image.shape[1], image.shape[0])
        if flag.path.lower().endswith(".json"):
            map_, record = draw_json(read_bytes(flag.path), flag.path, size, "stretch")
            kind = "pose"
        else:
            map_, text = read_image(read_bytes(flag.path), flag.path)
            record, kind = load(text), kind_of(flag.path, text, flag.kind)
        return self.compare(image, map_, kind, record, flag.path, name)

    def compare(self, image: np.ndarray, map_: np.ndarray, kind: str, record: dict, path: str, name: str) -> Scored:
        """The scores of an image (H, W, 3) uint8 for a map of a kind whose PNG text says `record`."""
        from controlnet.preprocessors.geometry import fit

        self.check(map_, kind, record, path)
        size = (map_.shape[1], map_.shape[0])
        if record.get("resize") in ("crop", "pad") and not _same_aspect(image, map_):
            image = fit(
                image, size, record["resize"]
            )  # the photo itself, as the map's record says it was brought there
        if not _same_aspect(image, map_):
            raise InputError(
                f"{path}: {map_.shape[1]}x{map_.shape[0]}, of another aspect than {name},"
                f" {image.shape[1]}x{image.shape[0]}",
                "the map that the image was made from",
            )
        scorer = {"depth": _depth, "pose": _pose}.get(kind, _lines)
        return scorer(self, image, map_, kind, record, path)

    @staticmethod
    def check(map_: np.ndarray, kind: str, record: dict, path: str) -> None:
        """Raises UsageError or InputError for a map that no image can be held against."""
        if kind not in SCORED:
            raise UsageError(f"{path}: kind {kind!r} has no score; expected {', '.join(SCORED)}", f"{path},kind=canny")
        if kind == "pose" and "keypoints" not in record:
            raise InputError(
                f"{path}: carries no key points in its PNG text",
                "a map of controlnet detect pose, or its --keypoints file",
            )
        if kind != "pose" and int(map_.max()) - int(map_.min()) < 8:
            raise InputError(f"{path}: one flat colour, there is nothing to keep to", "make the map again")

    def found(self, image: np.ndarray, map_: np.ndarray, kind: str, record: dict) -> tuple[np.ndarray, dict]:
        """What the map's own detector and options find on the image, looked at in the map's size."""
        from controlnet.preprocessors.geometry import fit

        options = json.dumps(record.get("options", {}) if record.get("kind") == kind else {})
        own = record.get("detector") if record.get("kind") == kind else None
        own = own if isinstance(own, str) else None
        make: Callable = self.make(kind, own, options)
        return make(fit(image, (map_.shape[1], map_.shape[0]), "stretch"))

    def _make(self, kind: str, name: str | None, options: str) -> Callable:
        from controlnet.preprocessors.detectors.registry import find_detector

        row = find_detector(kind, name)
        try:
            given = {**json.loads(options)} | ({"allow_empty": True} if kind == "pose" else {})
            chosen = row.load_options()(**given)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the map's record has options that {row.name} does not know: {reason(error)}", "make the map again"
            ) from error
        return row.ready(chosen, offline=self.offline)


def _same_aspect(image: np.ndarray, map_: np.ndarray) -> bool:
    ratio = map_.shape[1] / map_.shape[0] * image.shape[0] / image.shape[1]
    return abs(ratio - 1) <= ASPECT


def _lines(scorer: Scorer, image, map_, kind: str, record: dict, path: str) -> Scored:
    import numpy as np
    from controlnet.model.sampling.canvas import to_canvas
    from controlnet.preprocessors.agreement import edge_f1, ssim
    from controlnet.preprocessors.stage_one import rgb

    found, _ = scorer.found(image, map_, kind, record)
    size = (image.shape[1], image.shape[0])
    true, found = (to_canvas(rgb(m), kind, size).max(2) for m in (map_, found))
    near = max(1, round(min(size) / 256))
    lit_true, lit = ((m > 127).astype(np.uint8) * 255 for m in (true, found))
    scores = {"f1": edge_f1(lit, lit_true), "f1_near": edge_f1(lit, lit_true, near), "ssim": ssim(found, true)}
    shown = np.stack([lit_true, np.minimum(lit, lit_true), lit], 2)  # red: missed; blue: too much; white: kept
    return Scored(kind, scores, true, found, shown)


def _depth(scorer: Scorer, image, map_, kind: str, record: dict, path: str) -> Scored:
    import cv2
    import numpy as np
    from controlnet.model.sampling.canvas import to_canvas
    from controlnet.preprocessors.agreement import aligned, depth_rmse, rank_correlation
    from controlnet.preprocessors.stage_one import rgb

    found, _ = scorer.found(image, map_, kind, record | {"options": {}})
    size = (image.shape[1], image.shape[0])
    true, found = (to_canvas(rgb(m), kind, size)[..., 0] for m in (map_, found))
    scores = {"rmse": depth_rmse(found, true), "rank_correlation": rank_correlation(found, true)}
    off = np.abs(aligned(found, true) - true).clip(0, 255).astype(np.uint8)
    return Scored(kind, scores, true, found, cv2.applyColorMap(off, cv2.COLORMAP_INFERNO)[..., ::-1])


def _pose(scorer: Scorer, image, map_, kind: str, record: dict, path: str) -> Scored:
    import cv2
    import numpy as np
    from controlnet.preprocessors.agreement import match_people, oks, pck
    from controlnet.preprocessors.skeleton import draw, from_text

    size = (image.shape[1], image.shape[0])
    true = from_text(record, path) or []
    people = [p * (*size, 1) for p in true if (p[:, 2] > 0).sum() >= 3]
    if not people:
        raise InputError(f"{path}: nobody in it", "a map with people")
    _, fields = scorer.found(image, np.zeros((512 * size[1] // min(size), 512 * size[0] // min(size))), kind, record)
    others = [np.array(p) * (*size, 1) for p in fields["keypoints"]]
    pairs = match_people(others, people)
    nobody = np.zeros((18, 3))
    matched = [(nobody if i is None else others[i], people[k]) for i, k in pairs]
    scores = {measure.__name__: float(np.mean([measure(*pair) for pair in matched])) for measure in (oks, pck)}
    scores |= {"people": float(len(people)), "found": float(len(others))}
    shown = draw(true, size) // 3
    for other, person in matched:
        for joint in np.flatnonzero((other[:, 2] > 0) & (person[:, 2] > 0)):
            a, b = (tuple(int(v) for v in p[joint, :2]) for p in (person, other))
            cv2.line(shown, a, b, (255, 60, 60), max(1, min(size) // 256))
            cv2.circle(shown, b, max(1, min(size) // 128), (255, 255, 255), -1)
    drawn = draw([other / (*size, 1) for other in others], size)
    return Scored(kind, scores, draw(true, size), drawn, shown)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval of it (percentile; Efron 1979), the same for the same values."""
    import numpy as np

    sample = np.asarray(values)
    rng = np.random.default_rng(0)
    means = sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(sample.mean()), float(low), float(high)


def _recorded_path(condition: dict, image: str) -> str:
    """Where a condition of an image's record is now."""
    path = Path(condition["path"])
    if condition["path"] == "-":
        raise InputError(f"{image}: its condition came from standard input", f"controlnet score {image} --cond MAP")
    beside = Path(image).parent / path.name
    return str(beside if not path.is_file() and beside.is_file() else path)


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}


def _write_overlay(path: Path, image: str, results: list[tuple[str, Scored]]) -> None:
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.images import png_bytes, read_bytes, read_image
    from controlnet.preprocessors.sheet import contact_sheet

    picture, _ = read_image(read_bytes(image), image)
    told = {"depth": "off by: black little, yellow much", "pose": "from where it should be to where it is"}
    cells = []
    for name, one in results:
        cells += [(picture, Path(image).name), (one.condition, f"asked for: {Path(name.split(',')[0]).name}"),
                  (one.found, "found on the image"),
                  (one.shown, told.get(one.kind, "red missed, blue too much, white kept"))]  # fmt: skip
    write_file(path, png_bytes(contact_sheet(cells, 4, 256)))
    say(f"look at {path}")
