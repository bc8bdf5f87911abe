"""Measures the embedded model on held-out scenes and writes its card: weights/README.md, card.json and samples.png.

    python -m controlnet.model.tiny.card

Control is scored per kind, between the condition and what is detected again on the image (`readers.py`): T with the
scene's own condition, S with another scene's, 0 without control, C on the VAE's reconstruction of the scene itself (the
ceiling of any model with this VAE). T and S are made twice: with control on the half of the guidance that reads the
prompt alone, as in the paper's section 3.4 and as `tiny` has it, and on both halves.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from controlnet.model.base import Base
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.strength import Strength
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.registry import BASES, TINY
from controlnet.model.sampling.canvas import to_pixels
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.tiny.readers import JointReader, Measure, PartReader, Reader, measures
from controlnet.model.tiny.world.render import FLOOR, MAIN, WALL
from controlnet.model.tiny.world.scenes import make_scene
from controlnet.model.tiny.world.shards import HELD_OUT, World, world
from controlnet.model.training.precision import attention_kernels
from controlnet.preprocessors.agreement import pck
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.sheet import contact_sheet
from controlnet.preprocessors.skeleton import crossing

REGIONS = {"floor": FLOOR, "wall": WALL, "main": MAIN}
STEPS = 20
BATCH = {"cpu": 25, "cuda": 100}
READ = 4000
"""Scenes that the readers are trained on; all go through the VAE once, which takes a CPU the longest."""
READERS = {"cpu": (6.0, 10.0), "cuda": (0.4, 0.5)}
"""Minutes in which the readers of joints and of parts are trained."""


class Colours:
    """Names a region's colour from its mean RGB: the five nearest regions of reference scenes vote."""

    def __init__(self, data: World, seeds: range):
        scenes = [make_scene(seed) for seed in seeds]
        self.known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for region, part in REGIONS.items():
            rows = [
                (mean, name)
                for i, scene in enumerate(scenes)
                if (name := region_colour(scene, region))
                and (mean := region_mean(data.images[i], data.parts[i] == part)) is not None
            ]
            self.known[region] = np.array([m for m, _ in rows]), np.array([n for _, n in rows])

    def read(self, region: str, mean: np.ndarray) -> str:
        means, names = self.known[region]
        votes = names[np.argsort(((means - mean) ** 2).sum(1))[:5]]
        values, counts = np.unique(votes, return_counts=True)
        return str(values[counts.argmax()])

    def accuracy(
        self, images: np.ndarray, held_out: World, rows: np.ndarray, parts: np.ndarray | None = None
    ) -> dict[str, list[float]]:
        """The share of regions in images (N, H, W, 3) whose colour is that of the held-out scenes `rows` (N,), with
        intervals.

        A region is where `parts` (N, H, W) says, by default where the scene has it. A region that an image should have
        but `parts` does not show counts as wrong.
        """
        found = {}
        for region, part in REGIONS.items():
            right = []
            for i, row in enumerate(rows):
                name = region_colour(make_scene(HELD_OUT + int(row)), region)
                if name is None or region_mean(images[i], held_out.parts[row] == part) is None:
                    continue  # the scene has none, or too little of it is seen
                mean = region_mean(images[i], (held_out.parts[row] if parts is None else parts[i]) == part)
                right.append(mean is not None and self.read(region, mean) == name)
            found[region] = interval(np.array(right, float))
        return found


def region_colour(scene, region: str) -> str | None:
    look = {"floor": scene.floor, "wall": scene.wall, "main": scene.main}[region]
    return look.name if look else None


def region_mean(image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Mean RGB of a region without its rim; None where too little of it is seen."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return image[inner].mean(0) if inner.sum() >= 30 else None


def make_images(
    base: Base, net: ControlNet | None, captions: list[str], conditions: list[np.ndarray], seed: int = 0, **strength
) -> np.ndarray:
    """One image per caption, (N, H, W, 3) uint8, at the base's native size and default guidance."""
    nets = [] if net is None else [(net, Strength(**strength))]
    requests = [Request(caption, seed + i, (conditions[i],) if nets else ()) for i, caption in enumerate(captions)]
    return np.stack(list(generate(base, requests, nets, steps=STEPS, batch=BATCH[base.device.type])))


@torch.no_grad()
def reconstruct(base: Base, images: np.ndarray) -> np.ndarray:
    out, batch = [], BATCH[base.device.type]
    for i in range(0, len(images), batch):
        x = torch.from_numpy(images[i : i + batch]).permute(0, 3, 1, 2).to(base.device, base.dtype) / 127.5 - 1
        out.append(to_pixels(base.vae.decode(base.vae.encode(x).latents).sample.float().clamp(-1, 1)))
    return np.concatenate(out)


def interval(values: np.ndarray) -> list[float]:
    """Mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(1)
    return [round(float(v), 4) for v in (values.mean(), *np.percentile(means, [2.5, 97.5]))]


def crossing_limbs(found: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """How many of the people `true` (N, 18, 3) have limbs that cross, and the PCK@0.1 of the joints (N, 18, 2) of these
    that were found."""
    people = [(f, t, among) for f, t in zip(found, true, strict=True) if (among := crossing(t)).any()]
    return {"people": len(people), "pck": interval(np.array([pck(f, t, among=among) for f, t, among in people]))}


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    error = ((a.astype(float) - b) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / error.clip(1e-6))


R = TypeVar("R", bound=Reader)


def trained(reader: R, base: Base, runs: Path, minutes: float) -> R:
    """The reader from its checkpoint in `runs`, or trained first: for pictures of this size that this VAE decodes."""
    data = world(runs / "world", READ, base.native_size, 0, base.device.type)
    data = data.only(reader.scenes(data))
    blurred = cache(lambda: reconstruct(base, data.images))  # takes minutes; only needed if there is training to do
    with attention_kernels(base.device):
        vae = model_hash(Path(base.path) / "vae")[:8]
        reader.train(data, blurred, runs / f"{reader.name}-{base.native_size}-{vae}", minutes, base.device)
    return reader


def load_weights(weights: Path, device: torch.device) -> Base:
    """The model of a training, which is used as the shipped one is."""
    base, shipped = load_base(str(weights), device), BASES["tiny"]
    assert shipped.guidance is not None
    base.guidance, base.control_on = shipped.guidance, shipped.control_on
    return base


def joint_reader(base: Base, runs: Path) -> JointReader:
    return trained(JointReader(), base, runs, READERS[base.device.type][0])


def evaluate(weights: Path, runs: Path, scenes: int, device: torch.device) -> tuple[dict, np.ndarray]:
    """All figures of the card, and the sample sheet."""
    base = load_weights(weights, device)
    size = base.native_size
    # Enough held-out scenes for as many with people: every third one has some.
    held_out = world(runs / "world", 4 * scenes, size, HELD_OUT, device.type)
    colours = Colours(world(runs / "world", 1500, size, 0, device.type), range(1500))
    joints, parts = joint_reader(base, runs), trained(PartReader(), base, runs, READERS[device.type][1])
    card: dict[str, Any] = {"scenes": scenes, "size": size, "steps": STEPS, "guidance": base.guidance, "control": {}}
    samples: list = []
    for measure in measures(joints):
        rows = measure.rows(held_out)[:scenes]
        net = load_controlnet(weights / f"controlnet-{measure.kind}", base.dtype).to(device)
        captions = [held_out.captions[row] for row in rows]
        conditions = [measure.condition(held_out, int(row)) for row in rows]
        others = conditions[1:] + conditions[:1]
        drawn = held_out.images[rows]
        pictures = {"C": reconstruct(base, drawn)}
        for key, by, given, half in (
            ("T", net, conditions, "cond"),
            ("S", net, others, "cond"),
            ("T_both", net, conditions, "both"),
            ("S_both", net, others, "both"),
            ("0", None, conditions, "cond"),
        ):
            pictures[key] = make_images(base, by, captions, given, control_on=half)
            print(f"{measure.kind}: {len(rows)} images for {key}", flush=True)
        scores = {key: np.array(measure.scores(made, held_out, rows, conditions)) for key, made in pictures.items()}
        found: dict[str, Any] = {key: interval(values) for key, values in scores.items()}
        for way in ("", "_both"):
            t, s, c = (float(scores[key].mean()) for key in ("T" + way, "S" + way, "C"))
            found["control" + way] = round((t - s) / (c - s), 4)
            found["colours" + way] = colours.accuracy(pictures["T" + way], held_out, rows)
        card["control"][measure.kind] = found
        if measure.kind == "pose":
            true, seen = held_out.joints[rows], joints.read(drawn)
            card["crossing"] = crossing_limbs(joints.read(pictures["T"]), true)
            card["crossing"]["read"] = crossing_limbs(seen, true)["pck"][0]
            card["joints_read"] = interval(np.array(measure.scores(drawn, held_out, rows, conditions)))
        if measure.kind == "canny":
            card["vae_psnr"] = interval(psnr(pictures["C"], drawn))
            card["reader"] = colours.accuracy(drawn, held_out, rows)
            for name, made in (("colours_free", pictures["0"]), ("parts_reader", drawn)):
                card[name] = colours.accuracy(made, held_out, rows, parts.read(made))
        for i in (0, 10):
            samples += [
                (held_out.images[rows[i]], "scene"),
                (conditions[i], f"its {measure.kind}"),
                (pictures["T"][i], captions[i]),
                (pictures["S"][i], f"another scene's {measure.kind}"),
                (pictures["0"][i], "no control"),
            ]
    return card, contact_sheet(samples, 5, size)


def _row(name: str, value: list[float]) -> str:
    return f"| {name} | {value[0]:.3f} | {value[1]:.3f} to {value[2]:.3f} |"


def _control_section(measure: Measure, found: dict) -> str:
    """The card's section on one kind."""
    colours = [_row(k, values) + _row("", found["colours_both"][k])[4:] for k, values in found["colours"].items()]
    return f"""### {measure.kind}
{measure.name}: {measure.told}.

| made with | {measure.name} | interval |
|---|---|---|
{_row("T: the scene's own condition", found["T"])}
{_row("S: another scene's condition", found["S"])}
{_row("T with `--control-on both`", found["T_both"])}
{_row("S with `--control-on both`", found["S_both"])}
{_row("no control", found["0"])}
{_row("C: the VAE's reconstruction, the ceiling", found["C"])}

**(T - S) / (C - S) = {found["control"]:.2f}**; with `--control-on both` {found["control_both"]:.2f}

| colour as the prompt names it | share | interval | `--control-on both` | interval |
|---|---|---|---|---|
{chr(10).join(colours)}
"""


def write_card(weights: Path, card: dict, training: dict) -> None:
    """README.md and card.json beside the weights."""

    def lowest(name: str) -> str:
        return f"{min(value[0] for value in card[name].values()):.3f}"

    stages = "\n".join(
        f"| {name} | {stage['scenes']:,} | {stage['steps']:,} | {stage['minutes']:.0f} |"
        for name, stage in training["stages"].items()
    )
    parts = [_control_section(measure, card["control"][measure.kind]) for measure in measures(JointReader())]
    crossed = card["crossing"]
    found, low, high = crossed["pck"]
    text = f"""---
license: apache-2.0
tags: [controlnet, text-to-image, stable-diffusion-layout]
---
# tiny

The embedded model of the ControlNet toolkit: a latent text-to-image model in Stable Diffusion's layout with ControlNets
for {", ".join(card["control"])}, native size {card["size"]} pixels. It knows one small world and nothing else:
spheres, cubes, cylinders and cones, people made of capsules, and posters of flat, shaded and striped regions, in twelve
colours. It is there to learn, to test and to script with; for pictures of the real world take Stable Diffusion weights.

## Training
Procedural scenes (no photo, no other data), on {training["machine"]}.
One command trains it again: `make tiny`.

| stage | scenes | optimiser steps | minutes |
|---|---|---|---|
{stages}

## Measured
On {card["scenes"]} held-out scenes a kind, {card["steps"]} steps, guidance {card["guidance"]:g}; mean and 95 %
bootstrap interval. `make card` measures again. The VAE's reconstruction of the scenes has a PSNR of
{card["vae_psnr"][0]:.1f} dB.

{chr(10).join(parts)}
### no control
Where floor, wall and main object are is told by a network trained on the world.

| colour as the prompt names it | share | interval |
|---|---|---|
{chr(10).join(_row(region, values) for region, values in card["colours_free"].items())}

{crossed["people"]} of the people have limbs that cross each other or the trunk: with T, PCK@0.1 of the joints of these
limbs is {found:.3f} ({low:.3f} to {high:.3f}); of the scenes themselves the network reads {crossed["read"]:.3f}.

Colours are read by the five nearest of 1,500 reference scenes; of the scenes themselves that is right in
at least {lowest("reader")}, and where the network has to find the parts in at least {lowest("parts_reader")}.
Joints are read by another network; of the scenes themselves it finds {card["joints_read"][0]:.3f}.

![held-out scenes](samples.png)
"""
    write_file(weights / "README.md", text.encode())
    write_file(weights / "card.json", (json.dumps(card, indent=2) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=TINY)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="where drawn scenes are kept")
    parser.add_argument("--scenes", type=int, default=200)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card, samples = evaluate(args.weights, args.runs, args.scenes, device)
    write_file(args.weights / "samples.png", png_bytes(samples))
    write_card(args.weights, card, json.loads((args.weights / "training.json").read_text()))
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
