"""`make tiny`: trains the embedded model from nothing, on this machine, and writes it as diffusers folders.

    python -m controlnet.model.tiny.train --minutes vae=100,text=5,half=240,base=400,canny=60,pose=40,depth=60

Every stage goes on where it was interrupted, and is skipped once its minutes (or `--steps`) are used up; `--until vae`
ends after that stage. The base is trained at half the size first, where a picture costs a quarter. CUDA is used if
present.
`--start` begins with the weights of an earlier training, such as the ones that the package ships, instead of nothing;
`--keep vae` takes no more than the VAE from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.files.tensors import read_json
from controlnet.model.files.tokenizer import load_tokenizer
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet, save_controlnet
from controlnet.model.tiny.conditions import CONDITIONS, drawn
from controlnet.model.tiny.recipe import make_scheduler, make_tokenizer
from controlnet.model.tiny.stages import (
    Limit,
    cached_latents,
    end_if_stopped,
    half_latents,
    mark_of,
    train_base,
    train_control,
    train_text,
    train_vae,
)
from controlnet.model.tiny.world.scenes import WORLD_VERSION, vary
from controlnet.model.tiny.world.shards import world
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.loop import Progress
from controlnet.model.training.precision import attention_kernels

STAGES = ("vae", "text", "half", "base", *CONDITIONS)
MINUTES = "vae=100,text=5,half=240,base=400,canny=60,pose=40,depth=60"
MAX_SHARD = "14MB"
THEN = ", then "
"""Between the machines of a training, in its record."""
BATCHES = {
    "cpu": {"vae": 16, "text": 64, "half": 64, "base": 32, "control": 32},
    "cuda": {"vae": 32, "text": 256, "half": 512, "base": 256, "control": 128},
}
"""Samples in a step. Smaller ones leave a GPU waiting for the program."""
CROPS = {"cpu": 64, "cuda": 128}
"""Side of the pieces of pictures that the VAE is trained on, in pixels."""


def parse_stages(text: str) -> dict[str, float]:
    """`30` for every stage, or some of `vae=100,text=5,half=240,base=400,canny=60,pose=40,depth=60`; others get 0."""
    if "=" not in text:
        return dict.fromkeys(STAGES, float(text))
    values = {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
    if unknown := set(values) - set(STAGES):
        raise ValueError(f"unknown stage {sorted(unknown)[0]!r}; stages are {', '.join(STAGES)}")
    return dict.fromkeys(STAGES, 0.0) | values


def limits(minutes: str, steps: str | None) -> dict[str, Limit]:
    """How long each stage trains: in steps, if they are given, else in minutes. A stage of 0 has no key but minutes."""
    if steps is None:
        return {stage: {"minutes": value} for stage, value in parse_stages(minutes).items()}
    counts = parse_stages(steps).items()
    return {stage: {"max_steps": int(count)} if count else {"minutes": 0.0} for stage, count in counts}


def save_base(folder: Path, vae, unet, text_encoder, tokenizer: Path) -> None:
    """The base as float16 safetensors in diffusers' folders; `tokenizer` is a folder."""
    for name, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        module.to("cpu", torch.float16).to(memory_format=torch.contiguous_format)
        module.save_pretrained(folder / name, max_shard_size=MAX_SHARD)
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    make_scheduler().save_pretrained(folder / "scheduler")
    # AutoencoderTiny writes a key that it warns about on reading; -Infinity is not JSON; paths are this machine's.
    unwanted = {"vae/config.json": "block_out_channels", "scheduler/scheduler_config.json": "lambda_min_clipped"}
    for file in ("vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
        config = json.loads((folder / file).read_text())
        kept = {k: v for k, v in config.items() if k not in (unwanted.get(file), "_name_or_path")}
        (folder / file).write_text(json.dumps(kept, indent=2, allow_nan=False) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderTiny"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class Training:
    """All stages of one training, each begun with the network that an earlier training left, or with nothing."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.limits, self.kept = limits(args.minutes, args.steps), args.keep.split(",")
        self.earlier = (
            read_json(args.start / "training.json", "the record of an earlier training")
            if args.start
            else {"stages": {}}
        )
        self.size = args.size or self.earlier.get("size", 256)
        self.run = args.runs / str(self.size)
        self.begun: dict[str, Any] = dict.fromkeys(STAGES)
        if args.start:
            self._begin_with(args.start)
        self._check_whole()

        self.data = world(args.runs / "world", args.scenes, self.size, device=device.type)
        self.scenes = f"v{WORLD_VERSION}-{args.scenes}"  # in the names of what is made of them
        self.drawer = ThreadPoolExecutor(1)
        self.maps = self._draw_maps(args.runs / "world")
        self.tokenizer = load_tokenizer(self.run / "tokenizer") if args.start else self._new_tokenizer()
        self.progress: dict[str, Progress] = {}
        self.nets: dict[str, ControlNet] = {}

    def _draw_maps(self, shards: Path) -> dict[str, Future[np.ndarray]]:
        """The conditions of every kind that is to be trained; beside a GPU they are drawn while it trains the base."""
        folder = self.run / "maps"
        maps = {
            kind: self.drawer.submit(drawn, kind, self.data, shards, folder / f"{kind}-{self.scenes}.npy")
            for kind in CONDITIONS
            if any(self.limits[kind].values())
        }
        if self.device.type == "cpu":
            for one in maps.values():
                one.result()
        return maps

    def _check_whole(self) -> None:
        """Raises ValueError for a network that would be written as it was drawn at random."""
        last = STAGES.index(self.args.until) if self.args.until else len(STAGES)
        for name in STAGES[: last + 1]:
            trains = any(self.limits[name].values()) or Checkpoints(self.run / name / "checkpoints").steps()
            if name != "half" and not trains and self.begun[name] is None:
                raise ValueError(f"{name} gets no minutes and no steps, and --start has none to begin with")

    def _begin_with(self, start: Path) -> None:
        """Take over the tokenizer and those networks of an earlier training that are to be kept."""
        base = load_base(str(start), self.device, torch.float32)
        found: dict[str, Any] = {"vae": base.vae, "text": base.text_encoder, "base": base.unet}
        for kind in CONDITIONS:
            if (folder := start / f"controlnet-{kind}").is_dir():
                found[kind] = load_controlnet(folder, torch.float32)
        for name, network in found.items():
            if name in self.kept:
                self.begun[name] = network.requires_grad_(True)
        shutil.copytree(start / "tokenizer", self.run / "tokenizer", dirs_exist_ok=True)

    def _new_tokenizer(self):
        rng = np.random.default_rng(0)
        captions = self.data.captions[:10_000]
        corpus = [text for caption in captions for text in (caption, vary(caption, rng, 0.5))]
        return make_tokenizer(corpus, self.run / "tokenizer")

    def train(self) -> None:
        """The stages, one after another."""
        data, run, device, limit, begun = self.data, self.run, self.device, self.limits, self.begun
        batch, crop = BATCHES[device.type], CROPS[device.type]
        self.vae, reached = train_vae(data, run / "vae", limit["vae"], device, begun["vae"], batch["vae"], crop)
        self.finish("vae", reached)
        made = f"{self.scenes}-{mark_of(self.vae)}.pt"  # by this VAE, of these scenes
        latents = cached_latents(self.vae, data.images, run / f"latents-{made}", device).to(device)

        captions, tokenizer = data.captions, self.tokenizer
        text_encoder, reached = train_text(
            latents, captions, tokenizer, run / "text", limit["text"], device, begun["text"], batch["text"]
        )
        self.finish("text", reached)

        # The base learns at half the size first, where a picture costs a quarter.
        halves = latents
        if any(limit["half"].values()):
            halves = half_latents(self.vae, data.images, run / f"latents-half-{made}", device).to(device)
        unet = begun["base"]
        for name, pictures in (("half", halves), ("base", latents)):
            unet, text_encoder, reached = train_base(
                pictures,
                captions,
                tokenizer,
                text_encoder,
                self.size,
                run / name,
                limit[name],
                device,
                unet,
                batch[name],
            )
            self.finish(name, reached)
        self.unet, self.text_encoder = unet, text_encoder

        for kind in CONDITIONS:
            # How to steer the base is learned once: later kinds begin with the first one's network.
            start = begun[kind] or copy.deepcopy(self.nets.get("canny"))
            self.nets[kind], reached = train_control(
                kind,
                self.unet,
                self.text_encoder,
                data,
                self.maps[kind].result() if kind in self.maps else np.empty(0, np.uint8),
                latents,
                tokenizer,
                run / kind,
                limit[kind],
                device,
                start,
                batch["control"],
            )
            self.finish(kind, reached)

    def finish(self, name: str, reached: Progress) -> None:
        """Record a stage. The command ends if a signal stopped it, and after the stage `--until`."""
        self.progress[name] = reached
        end_if_stopped(self.run / name)
        if name == self.args.until:
            print(f"{name} is trained; the same command without --until goes on")
            sys.exit(0)

    def write(self, out: Path) -> None:
        """The model in diffusers' layout, and what it took to train."""
        out.mkdir(parents=True, exist_ok=True)
        save_base(out, self.vae, self.unet, self.text_encoder, self.run / "tokenizer")
        for kind, net in self.nets.items():
            save_controlnet(net, out / f"controlnet-{kind}", torch.float16)
        training = {"size": self.size, "machine": THEN.join(self._machines()), "stages": self._spent()}
        (out / "training.json").write_text(json.dumps(training, indent=2) + "\n")

    def _machines(self) -> list[str]:
        """Which machines trained it, one after another."""
        here = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        machines = []
        if any(name in self.earlier["stages"] for name in self.kept):
            machines = self.earlier["machine"].split(THEN)
        if not machines or any(reached.step for reached in self.progress.values()):
            machines.append(f"{here}, torch {torch.__version__}")
        return [name for name, _ in groupby(machines)]

    def _spent(self) -> dict[str, dict[str, float]]:
        """Scenes, steps and minutes of each stage, those of an earlier training included; fewer scenes are the first
        ones of more."""
        stages = {}
        for name, reached in self.progress.items():
            before = self.earlier["stages"].get(name, {}) if name in self.kept else {}
            steps, minutes = before.get("steps", 0) + reached.step, before.get("minutes", 0.0) + reached.seconds / 60
            scenes = max(before.get("scenes", 0), self.args.scenes if reached.step else 0)
            if steps:
                stages[name] = {"scenes": scenes, "steps": steps, "minutes": round(minutes, 1)}
        return stages


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", default=MINUTES, help="training minutes of each stage")
    parser.add_argument("--steps", help="optimiser steps of each stage, in place of minutes")
    parser.add_argument("--until", choices=STAGES, help="the last stage to train; the model is written after them all")
    parser.add_argument("--size", type=int, help="native pixels of the model (default: that of --start, or 256)")
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="where checkpoints and drawn scenes go")
    parser.add_argument("--start", type=Path, help="weights to begin with: the folder that --out was")
    parser.add_argument("--keep", default=",".join(STAGES), help="what of --start is taken")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="where the model goes")
    args = parser.parse_args(arguments)
    if unknown := set(args.keep.split(",")) - set(STAGES):
        parser.error(f"--keep: unknown stage {sorted(unknown)[0]!r}; stages are {', '.join(STAGES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # shapes stay the same
    try:
        training = Training(args, device)
    except ValueError as error:
        parser.error(str(error))
    with attention_kernels(device, small=training.size <= 256):
        try:
            training.train()
        finally:  # the command may end before all maps are drawn
            training.drawer.shutdown(wait=False, cancel_futures=True)
    training.write(args.out)
    print(f"written: {args.out}; now measure it with python -m controlnet.model.tiny.card")


if __name__ == "__main__":
    main()
