"""`make tiny`: trains the embedded model from nothing, on this machine, and writes it as diffusers folders.

    python -m controlnet.model.tiny.train --minutes vae=100,text=5,half=240,base=400,canny=60,pose=40,depth=60

Every stage goes on where it was interrupted, and is skipped once its minutes are used up; `--until vae` ends after that
stage. The base is trained at half the size first, where a picture costs a quarter. CUDA is used if present.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet, save_controlnet
from controlnet.model.tiny.recipe import make_scheduler, make_tokenizer
from controlnet.model.tiny.stages import (
    CONDITIONS,
    cached_latents,
    half_latents,
    train_base,
    train_control,
    train_text,
    train_vae,
)
from controlnet.model.tiny.world.scenes import vary
from controlnet.model.tiny.world.shards import world
from controlnet.model.training.loop import Progress
from controlnet.model.training.precision import attention

STAGES = ("vae", "text", "half", "base", *CONDITIONS)
MINUTES = "vae=100,text=5,half=240,base=400,canny=60,pose=40,depth=60"
MAX_SHARD = "14MB"


def parse_minutes(text: str) -> dict[str, float]:
    """`30` for every stage, or some of `vae=100,text=5,half=240,base=400,canny=60,pose=40,depth=60`."""
    if "=" not in text:
        return dict.fromkeys(STAGES, float(text))
    minutes = {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
    if unknown := set(minutes) - set(STAGES):
        raise ValueError(f"unknown stage {sorted(unknown)[0]!r}; stages are {', '.join(STAGES)}")
    return dict.fromkeys(STAGES, 0.0) | minutes


def save_base(folder: Path, vae, unet, text_encoder, tokenizer: Path) -> None:
    """The base as float16 safetensors in diffusers' folders; `tokenizer` is a folder."""
    for name, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        module.to("cpu", torch.float16).to(memory_format=torch.contiguous_format)
        module.save_pretrained(folder / name, max_shard_size=MAX_SHARD)
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    make_scheduler().save_pretrained(folder / "scheduler")
    # AutoencoderTiny writes a key that it warns of when it reads it; -Infinity is no JSON; paths are this machine's.
    unwanted = {"vae/config.json": "block_out_channels", "scheduler/scheduler_config.json": "lambda_min_clipped"}
    for file in ("vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
        config = json.loads((folder / file).read_text())
        kept = {k: v for k, v in config.items() if k not in (unwanted.get(file), "_name_or_path")}
        (folder / file).write_text(json.dumps(kept, indent=2, allow_nan=False) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderTiny"],
        "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", default=MINUTES, help="training minutes of each stage")
    parser.add_argument("--until", choices=STAGES, help="the last stage to train; the model is written after them all")
    parser.add_argument("--size", type=int, help="native pixels of the model (default: that of --start, or 256)")
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="where checkpoints and drawn scenes go")
    parser.add_argument("--start", type=Path, help="weights to begin with: the folder that --out was")
    parser.add_argument("--keep", default=",".join(STAGES), help="what of --start is taken")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="where the model goes")
    args = parser.parse_args(arguments)
    minutes, kept = parse_minutes(args.minutes), args.keep.split(",")
    if unknown := set(kept) - set(STAGES):
        parser.error(f"--keep: unknown stage {sorted(unknown)[0]!r}; stages are {', '.join(STAGES)}")
    args.size = args.size or (json.loads((args.start / "training.json").read_text())["size"] if args.start else 256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = args.runs / str(args.size)
    data = world(args.runs / "world", args.scenes, args.size, device=device.type)
    begun: dict[str, Any] = dict.fromkeys(STAGES)
    if args.start:
        base = load_base(str(args.start), device, torch.float32)
        begun |= {"vae": base.vae, "text": base.text_encoder, "base": base.unet}
        for kind in CONDITIONS:
            if (folder := args.start / f"controlnet-{kind}").is_dir():
                begun[kind] = load_controlnet(folder, torch.float32)
        begun = {name: network if name in kept else None for name, network in begun.items()}
        shutil.copytree(args.start / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
        tokenizer = base.tokenizer
        for network in filter(None, begun.values()):
            network.requires_grad_(True)
    else:
        rng = np.random.default_rng(0)
        corpus = [c for caption in data.captions[:10_000] for c in (caption, vary(caption, rng, 0.5))]
        tokenizer = make_tokenizer(corpus, run / "tokenizer")
    progress: dict[str, Progress] = {}
    nets: dict[str, ControlNet] = {}

    def finish(name: str, reached: Progress) -> None:
        """A stage that a signal has stopped ends the command: the next one would begin on half a network."""
        progress[name] = reached
        if json.loads((run / name / "log.jsonl").read_text().splitlines()[-1]).get("ended") == "stopped":
            print("stopped; the same command goes on")
            sys.exit(130)
        if name == args.until:
            print(f"{name} is trained; the same command without --until goes on")
            sys.exit(0)

    with attention(device, small=args.size <= 256):
        vae, reached = train_vae(data, run / "vae", minutes["vae"], device, vae=begun["vae"])
        finish("vae", reached)
        latents = cached_latents(vae, data.images, run / "latents.pt", device)
        text_encoder, reached = train_text(
            latents, data.captions, tokenizer, run / "text", minutes["text"], device, text_encoder=begun["text"]
        )
        finish("text", reached)
        halves = half_latents(vae, data.images, run / "latents-half.pt", device) if minutes["half"] else latents
        unet, text_encoder, reached = train_base(
            halves, data.captions, tokenizer, text_encoder, args.size, run / "half", minutes["half"], device,
            unet=begun["base"],
        )  # fmt: skip
        finish("half", reached)
        unet, text_encoder, reached = train_base(
            latents, data.captions, tokenizer, text_encoder, args.size, run / "base", minutes["base"], device, unet, 32
        )
        finish("base", reached)
        for kind in CONDITIONS:
            nets[kind], reached = train_control(
                kind, unet, text_encoder, data, latents, tokenizer, run / kind, minutes[kind], device,
                # How to steer the base is learned once: later kinds begin with the first one's network.
                controlnet=begun[kind] or copy.deepcopy(nets.get("canny")),
            )  # fmt: skip
            finish(kind, reached)
    earlier = json.loads((args.start / "training.json").read_text()) if args.start else {"stages": {}}
    stages = {}
    for name, reached in progress.items():
        before = earlier["stages"].get(name, {}) if name in kept else {}
        steps, spent = before.get("steps", 0) + reached.step, before.get("minutes", 0.0) + reached.seconds / 60
        if steps:
            stages[name] = {"steps": steps, "minutes": round(spent, 1)}

    args.out.mkdir(parents=True, exist_ok=True)
    save_base(args.out, vae, unet, text_encoder, run / "tokenizer")
    for kind, net in nets.items():
        save_controlnet(net, args.out / f"controlnet-{kind}", torch.float16)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    machine += f", torch {torch.__version__}"
    if not any(reached.step for reached in progress.values()):  # nothing was trained here
        machine = earlier.get("machine", machine)
    training = {
        "size": args.size, "scenes": args.scenes, "machine": machine, "stages": stages,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    print(f"written: {args.out}; now measure it with python -m controlnet.model.tiny.card")


if __name__ == "__main__":
    main()
