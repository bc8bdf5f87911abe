"""Measures the embedded model on held-out scenes and writes its card: weights/README.md, card.json and samples.png.

    python -m controlnet.model.tiny.card

Canny fidelity is the F1 score, with a tolerance of pixels, between the condition and the edges detected again on what
was made: T with the scene's own condition, S with another scene's, 0 without control, C on the VAE's reconstruction of
the scene itself (the ceiling of any model with this VAE).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from controlnet.model.base import Base, load_base
from controlnet.model.canvas import condition_tensor, to_canvas
from controlnet.model.checkpoint import load_controlnet
from controlnet.model.controlnet import ControlNet
from controlnet.model.generate import to_pixels
from controlnet.model.registry import TINY
from controlnet.model.sampling import Applied, draw_noise, sample
from controlnet.model.schedulers import make_scheduler
from controlnet.model.tiny.dataset import HELD_OUT, World, world
from controlnet.model.tiny.render import FLOOR, MAIN, WALL
from controlnet.model.tiny.scenes import make_scene
from controlnet.preprocessors.canny import canny
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import png_bytes, write_file
from controlnet.preprocessors.sheet import contact_sheet

REGIONS = {"floor": FLOOR, "wall": WALL, "main": MAIN}
STEPS = 20
BATCH = 25


def user_canny(image: np.ndarray) -> np.ndarray:
    """The condition (H, W, 3) uint8 a user would make of a picture (H, W, 3): `detect canny` at 512 pixels, then
    brought back to the picture's size as `generate` does."""
    edges = canny(fit(image, (512, 512)))
    return to_canvas(np.repeat(edges[..., None], 3, 2), "canny", (image.shape[1], image.shape[0]))


def edge_f1(found: np.ndarray, true: np.ndarray, tolerance: int) -> float:
    """F1 of two line maps (H, W) in {0, 255}: a pixel counts as matched when the other map has one within `tolerance`
    (in the maximum norm). 1 for two empty maps."""
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    near_true, near_found = cv2.dilate(true, kernel) > 0, cv2.dilate(found, kernel) > 0
    found, true = found > 0, true > 0
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    precision, recall = near_true[found].mean(), near_found[true].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


class ColourReader:
    """Tells a region's colour name from its mean RGB: the five nearest of reference scenes vote."""

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


def region_colour(scene, region: str) -> str | None:
    look = {"floor": scene.floor, "wall": scene.wall, "main": scene.main}[region]
    return look.name if look else None


def region_mean(image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Mean RGB of a region without its rim; None where too little of it is seen."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return image[inner].mean(0) if inner.sum() >= 30 else None


@torch.no_grad()
def make_images(
    base: Base, net: ControlNet | None, captions: list[str], conditions: list[np.ndarray], seed: int = 0
) -> np.ndarray:
    """One image a caption, (N, H, W, 3) uint8, at the base's native size and default guidance."""
    images = []
    null_text = base.encode_text([""])
    side = base.native_size // base.factor
    for i in range(0, len(captions), BATCH):
        text = base.encode_text(captions[i : i + BATCH])
        controls = []
        if net is not None:
            stack = torch.stack([condition_tensor(c) for c in conditions[i : i + BATCH]]).to(base.device, base.dtype)
            controls = [Applied(net, net.encode_hint(stack))]
        noise, generators = draw_noise(list(range(seed + i, seed + i + len(text))), (4, side, side))
        latents = sample(
            base.unet,
            make_scheduler(base.scheduler),
            noise,
            text,
            null_text,
            controls,
            STEPS,
            base.guidance,
            generators,
        )
        images.append(to_pixels(base.decode(latents.to(base.dtype))))
    return np.concatenate(images)


@torch.no_grad()
def reconstruct(base: Base, images: np.ndarray) -> np.ndarray:
    out = []
    for i in range(0, len(images), BATCH):
        x = torch.from_numpy(images[i : i + BATCH]).permute(0, 3, 1, 2).to(base.device, base.dtype) / 127.5 - 1
        out.append(to_pixels(base.vae.decode(base.vae.encode(x).latents).sample.float().clamp(-1, 1)))
    return np.concatenate(out)


def interval(values: np.ndarray) -> list[float]:
    """Mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(1)
    return [round(float(v), 4) for v in (values.mean(), *np.percentile(means, [2.5, 97.5]))]


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    error = ((a.astype(float) - b) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / error.clip(1e-6))


def evaluate(weights: Path, runs: Path, scenes: int, device: torch.device) -> tuple[dict, np.ndarray]:
    """All figures of the card, and the sample sheet."""
    base = load_base("tiny" if weights == TINY else str(weights), device)
    net = load_controlnet(weights / "controlnet-canny", base.dtype).to(device)
    size = base.native_size
    tolerance = 2 if size >= 256 else 1
    held_out = world(runs / "world", scenes, size, HELD_OUT, device.type)
    reader = ColourReader(world(runs / "world", 1500, size, 0, device.type), range(1500))
    described = [make_scene(HELD_OUT + i) for i in range(scenes)]
    conditions = [user_canny(image) for image in held_out.images]
    other = conditions[1:] + conditions[:1]

    made = {
        "T": make_images(base, net, held_out.captions, conditions),
        "S": make_images(base, net, held_out.captions, other),
        "0": make_images(base, None, held_out.captions, conditions),
        "C": reconstruct(base, held_out.images),
    }
    fidelity = {
        key: np.array(
            [edge_f1(user_canny(i)[..., 0], c[..., 0], tolerance) for i, c in zip(images, conditions, strict=True)]
        )
        for key, images in made.items()
    }  # fmt: skip
    colours: dict[str, dict[str, list[float]]] = {}
    for name, images in {
        "true condition": made["T"],
        "reconstruction": made["C"],
        "the scenes themselves": held_out.images,
    }.items():
        for region, part in REGIONS.items():
            right = [
                reader.read(region, mean) == region_colour(scene, region)
                for scene, image, parts in zip(described, images, held_out.parts, strict=True)
                if region_colour(scene, region) and (mean := region_mean(image, parts == part)) is not None
            ]
            colours.setdefault(name, {})[region] = interval(np.array(right, float))
    t, s, c = (fidelity[k].mean() for k in "TSC")
    card = {
        "scenes": scenes, "size": size, "steps": STEPS, "guidance": base.guidance, "tolerance_pixels": tolerance,
        "vae_psnr": interval(psnr(made["C"], held_out.images)),
        "canny_f1": {key: interval(values) for key, values in fidelity.items()},
        "control": round(float((t - s) / (c - s)), 4),
        "colour_accuracy": colours,
    }  # fmt: skip
    rows = []
    for i in range(0, 30, 10):
        rows += [(held_out.images[i], "scene"), (conditions[i], "its edges"), (made["T"][i], held_out.captions[i]),
                 (made["S"][i], "another scene's edges"), (made["0"][i], "no control")]  # fmt: skip
    return card, contact_sheet(rows, 5, size)


def write_card(weights: Path, card: dict, training: dict) -> None:
    def row(name: str, value: list[float]) -> str:
        return f"| {name} | {value[0]:.3f} | {value[1]:.3f} to {value[2]:.3f} |"

    f1, colours = card["canny_f1"], card["colour_accuracy"]
    stages = "\n".join(f"| {n} | {s['steps']:,} | {s['minutes']:.0f} |" for n, s in training["stages"].items())
    colour_rows = "\n".join(
        row(f"{region}, {name}", v) for name, regions in colours.items() for region, v in regions.items()
    )
    text = f"""---
license: apache-2.0
tags: [controlnet, text-to-image, stable-diffusion-layout]
---
# tiny

The embedded model of the ControlNet toolkit: a latent text-to-image model in Stable Diffusion's layout with a canny
ControlNet, native size {card["size"]} pixels. It knows one small world and nothing else: spheres, cubes, cylinders and
cones, people made of capsules, and posters of flat, shaded and striped regions, in twelve colours. It is there to
learn, to test and to script with; for pictures of the real world take Stable Diffusion weights.

## Training
{training["scenes"]:,} procedural scenes (no photo, no other data), on {training["machine"]}.
One command trains it again: `make tiny`.

| stage | optimiser steps | minutes |
|---|---|---|
{stages}

## Measured
On {card["scenes"]} held-out scenes, {card["steps"]} steps, guidance {card["guidance"]:g}; mean and 95 % bootstrap
interval. `make card` measures again.

| VAE | mean | interval |
|---|---|---|
{row("PSNR, dB", card["vae_psnr"])}

Canny fidelity: F1 between the condition and the edges detected again on the image, within
{card["tolerance_pixels"]} pixel(s).

| made with | F1 | interval |
|---|---|---|
{row("T: the scene's own edges", f1["T"])}
{row("S: another scene's edges", f1["S"])}
{row("no control", f1["0"])}
{row("C: the VAE's reconstruction, the ceiling", f1["C"])}

**(T - S) / (C - S) = {card["control"]:.2f}**

Colours: share of regions whose colour is the one that the prompt names, as read by the five nearest of 1,500 reference
scenes; the last rows are the reader's own accuracy on the scenes themselves.

| region, picture | accuracy | interval |
|---|---|---|
{colour_rows}

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
