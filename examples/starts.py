"""Pictures as a start, and adapters, in pictures: two sheets made by `tiny` through the commands' own engine.

    python examples/starts.py [docs/pictures] [--steps 300]

A LoRA and a word are learned here in a few minutes, from drawn scenes whose main thing is orange and whose captions do
not say so. Equal on the same machine each time: float32, fixed seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import peft
import torch
from controlnet.model.base import Base
from controlnet.model.control.unet import denoise
from controlnet.model.load import load_base
from controlnet.model.tiny.readers import pose_of, user_depth
from controlnet.model.tiny.world.render import MAIN, render
from controlnet.model.tiny.world.scenes import SHAPES, make_scene
from controlnet.model.tiny.world.shards import HELD_OUT
from controlnet.model.training.objective import NoiseSchedule
from controlnet.model.work.jobs import Job
from controlnet.model.work.studio import Studio
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.geometry import fit
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.sheet import contact_sheet
from safetensors.torch import save_file
from torch import nn

COLOUR, WORD = "orange", "<sun>"
SCENES, BATCH = 1000, 4
RATE, WORD_RATE = 2e-3, 3e-2
PERSON, ROOM = 19, 24
ONE_THING = (54, 29, 8, 42)
"""Held-out scenes; those of one thing show a cube, a sphere, a cone and a cylinder."""
Rows = list[list[tuple[np.ndarray, str]]]
SIZE = 256
"""Pixels of a drawn scene's side, the native size of `tiny`."""
SHOWN = 192
"""Pixels of a cell's side."""


@cache
def of_one_colour(size: int, word: str = "") -> tuple[np.ndarray, list[str]]:
    """Pictures (N, size, size, 3) uint8 with a thing of the colour, and captions that say the word in its place."""
    found = []
    for seed in range(SCENES):
        scene = make_scene(seed)
        said = [f"{COLOUR} {shape}" for shape in SHAPES if f"{COLOUR} {shape}" in scene.caption]
        if scene.sort == "objects" and said and scene.caption.count(COLOUR) == 1:
            found.append((scene, scene.caption.replace(f"{COLOUR} ", f"{word} " if word else "")))
    pictures = render([scene for scene, _ in found], size).images.numpy()
    return pictures, [caption for _, caption in found]


def learn(base: Base, steps: int, parameters: list[nn.Parameter], rate: float, word: str = "") -> None:
    """Train parameters on the pictures, in whose captions a word, or none, stands for the colour."""
    schedule = NoiseSchedule(base.scheduler)
    pictures, captions = of_one_colour(base.native_size, word)
    with torch.no_grad():
        latents = torch.cat([base.latent_of(picture) for picture in pictures])
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        prompt = base.encode_text([captions[row] for row in rows])
        z = schedule.add_noise(latents[rows], noise, t)
        loss = schedule.loss(denoise(base.unet, z, t, prompt), latents[rows], noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def learn_lora(path: Path, steps: int) -> None:
    base = load_base("tiny")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, base.unet)
    learn(base, steps, [p for name, p in base.unet.named_parameters() if "lora_" in name], RATE)
    state = peft.get_peft_model_state_dict(base.unet)
    save_file({f"unet.{name}": tensor.detach().contiguous() for name, tensor in state.items()}, path)


def learn_word(path: Path, steps: int) -> None:
    base = load_base("tiny")
    encoder = base.encoders[0]
    table = encoder.network.get_input_embeddings().weight
    vector = nn.Parameter(table[encoder.tokenizer("thing", add_special_tokens=False).input_ids[-1:]].detach().clone())
    encoder.learned[WORD] = vector
    learn(base, steps, [vector], WORD_RATE, WORD)
    save_file({WORD: vector.detach()}, path)


class Sheets:
    def __init__(self) -> None:
        self.studio = Studio(dtype="float32", offline=True)

    def make(self, **job) -> np.ndarray:
        return next(self.studio.images(Job(base="tiny", **job))).pixels

    def starts(self, folder: Path) -> Rows:
        """Rows of pictures, all under a condition: a shirt, other colours, and larger ones."""

        def kept(name: str, picture: np.ndarray) -> str:
            write_file(folder / name, png_bytes(picture))
            return str(folder / name)

        scenes = [make_scene(HELD_OUT + number) for number in (PERSON, ROOM)]
        drawn = render(scenes, SIZE)
        person, room = drawn.images.numpy()
        shirt = cv2.dilate((drawn.parts[0] == MAIN).numpy().astype(np.uint8) * 255, np.ones((13, 13), np.uint8))
        pose = kept("person.pose.png", pose_of(drawn.joints[0].numpy(), SIZE))
        painted = {"init": kept("person.png", person), "mask": kept("shirt.png", shirt), "cond": pose, "seed": 4}
        shirts = [
            (self.make(prompt=scenes[0].caption.replace("cyan", colour), **painted), f'--mask, "a {colour} shirt"')
            for colour in ("red", "yellow")
        ]

        colours = "a large yellow cone on the right of a blue cube, grey wall, brown floor"
        under = {"init": kept("room.png", room), "cond": kept("room.depth.png", user_depth(room)), "seed": 2}
        again = [
            (self.make(prompt=colours, strength=strength, **under), f'--strength {strength:g}, "a yellow cone, ..."')
            for strength in (0.5, 0.75, 0.95)
        ]

        larger = {"prompt": scenes[1].caption, "strength": 0.4, **under}
        enlarged = [
            (self.make(**larger, size=(512, 512)), "--size 512 --strength 0.4"),
            (self.make(**larger, size=(512, 512), tiles=True), "--size 512 --tiles"),
            (self.make(**larger, size=(1024, 1024), tiles=True), "--size 1024 --tiles"),
        ]
        mask = np.repeat(shirt[..., None], 3, 2)
        return [
            [(person, "a drawn scene"), (mask, "the mask"), *shirts],
            [(room, "a drawn scene, its depth the condition"), *again],
            [(room, f"{SIZE} pixels"), *enlarged],
        ]

    def adapters(self, folder: Path, lora: Path, word: Path) -> Rows:
        """Rows of pictures, the shapes by a depth map: a LoRA's scales, a learned word."""
        drawn = render([make_scene(HELD_OUT + number) for number in ONE_THING], SIZE)
        depths = []
        for number, picture in enumerate(drawn.images.numpy()):
            depths.append(str(folder / f"{number}.depth.png"))
            write_file(Path(depths[-1]), png_bytes(user_depth(picture)))

        plain = "a sphere, grey floor, blue wall"
        under = {"cond": depths[1], "seed": 3}
        scales = [(self.make(prompt=plain, **under), f'"{plain}"')] + [
            (self.make(prompt=plain, lora=(f"{lora}:{scale}",), **under), f"--lora {COLOUR}:{scale}")
            for scale in (0.5, 0.8, 1.0)
        ]
        words = [
            (self.make(prompt=f"a {WORD} {shape}, grey floor, blue wall", seed=3, cond=depth, embedding=(str(word),)),
             f'--embedding, "a {WORD} {shape}"')
            for shape, depth in zip(("cube", "sphere", "cone", "cylinder"), depths, strict=False)
        ]  # fmt: skip
        return [scales, words]


def sheet(rows: Rows) -> bytes:
    cells = [(fit(picture, (SHOWN, SHOWN), "stretch"), text) for row in rows for picture, text in row]
    return png_bytes(contact_sheet(cells, columns=len(rows[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    sheets = Sheets()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_file(args.out / "starts.png", sheet(sheets.starts(folder)))
        lora, word = folder / f"{COLOUR}.safetensors", folder / "word.safetensors"
        learn_lora(lora, args.steps)
        learn_word(word, args.steps)
        write_file(args.out / "adapters.png", sheet(sheets.adapters(folder, lora, word)))
    print(args.out)


if __name__ == "__main__":
    main()
