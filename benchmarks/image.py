"""A whole image by Stable Diffusion 1.5 and a ControlNet, from the shell to the PNG file, beside what one would use.

    python benchmarks/image.py [--steps 20] [--rows ours,...]

Random weights in float16, saved in diffusers' layout; 512 x 512, guidance 7.5, DDIM. Each row is a process of its own.
Where graphs are made and kept, the first run makes them, and the second one counts. Seconds of the whole process, and
its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

PROMPT, NEGATIVE, GUIDANCE, SIDE = "a red house beside a lake", "blurred", 7.5, 512
ROWS = {
    "ours": "ours",
    "ours-eager": "ours, --engine eager",
    "ours-low": "ours, --low-memory",
    "diffusers": "diffusers tuned: bfloat16, channels_last",
    "openvino": "OpenVINO alone: both networks one graph, and the decoder",
    "sdcpp": "stable-diffusion.cpp, float16",
}
DEFAULT = [row for row in ROWS if row != "sdcpp" or find_spec("stable_diffusion_cpp")]
"""`pip install stable-diffusion-cpp-python` builds the last one, in minutes; an image takes it longer than all others
together."""

KEEPING = ("ours", "openvino")
"""Rows that keep graphs."""


def make_models(folder: Path, small: bool) -> None:
    """A base and a ControlNet, in the folders `base` and `net`, and an edge map."""
    import numpy as np
    import torch
    from controlnet.model.files.families import VAE
    from controlnet.model.files.tokenizer import write_tokenizer
    from controlnet.model.nets import save_controlnet
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.images import png_bytes
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from generate import networks
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    unet, (net,) = networks(small)
    save_controlnet(net.half(), folder / "net")
    write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    ))  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(VAE), text_encoder=text, unet=unet, safety_checker=None, feature_extractor=None,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), requires_safety_checker=False,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
            set_alpha_to_one=False,
        ),
    ).to(torch.float16).save_pretrained(folder / "base")  # fmt: skip
    edges = np.zeros((SIDE, SIDE, 3), np.uint8)
    edges[100:400, 100:102] = edges[100:102, 100:400] = 255
    write_file(folder / "map.canny.png", png_bytes(edges))


def ours(folder: Path, steps: int, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "controlnet.cli.main", "generate", "--base", str(folder / "base"),
        "--cond", f"{folder / 'map.canny.png'},net={folder / 'net'}", "--prompt", PROMPT, "--negative", NEGATIVE,
        "--guidance", str(GUIDANCE), "--steps", str(steps), "--size", str(SIDE), "--seed", "1", "--scheduler", "ddim",
        "-o", str(folder / "ours.png"), "--overwrite", "--quiet", *more,
    ]  # fmt: skip


def by_diffusers(folder: Path, steps: int) -> None:
    """Also a picture by OpenVINO's graphs: the same pipeline with other networks in it."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from PIL import Image

    net = ControlNetModel.from_pretrained(folder / "net", torch_dtype=torch.bfloat16)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder / "base", controlnet=net, torch_dtype=torch.bfloat16, safety_checker=None
    )
    for network in (pipeline.unet, pipeline.controlnet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    image = pipeline(
        PROMPT, Image.open(folder / "map.canny.png"), negative_prompt=NEGATIVE, num_inference_steps=steps,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    image.save(folder / "diffusers.png")


def by_openvino(folder: Path, steps: int) -> None:
    """OpenVINO's graphs by hand, made by the first run; a later one reads them and loads the text encoder alone."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
    from peers import graph_of, one_graph, sampled
    from PIL import Image
    from transformers import AutoTokenizer, CLIPTextModel

    torch.set_grad_enabled(False)

    class Decoder(torch.nn.Module):
        def __init__(self, vae):
            super().__init__()
            self.vae = vae

        def forward(self, z):
            return (self.vae.decode(z).sample,)

    half = {"torch_dtype": torch.bfloat16}
    made = (folder / "both.xml").is_file() and (folder / "decoder.xml").is_file()
    meta = type("meta", (), {"dtype": torch.bfloat16, "config": type("config", (), {"cross_attention_dim": 768})})
    unet = meta if made else UNet2DConditionModel.from_pretrained(folder / "base" / "unet", **half)
    net = None if made else ControlNetModel.from_pretrained(folder / "net", **half)
    both = one_graph(unet, [] if net is None else [net], folder, SIDE)
    vae = torch.nn.Module() if made else AutoencoderKL.from_pretrained(folder / "base" / "vae", **half)
    z = torch.zeros(1, 4, SIDE // 8, SIDE // 8, dtype=torch.bfloat16)
    decoder = graph_of(vae if made else Decoder(vae), (z,), folder / "decoder.xml")

    tokenizer = AutoTokenizer.from_pretrained(folder / "base" / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "base" / "text_encoder", **half)
    ids = tokenizer([NEGATIVE, PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    texts = encoder(ids)[0]
    condition = torch.from_numpy(np.array(Image.open(folder / "map.canny.png").convert("RGB"))).permute(2, 0, 1)
    scheduler = DDIMScheduler.from_pretrained(folder / "base" / "scheduler")
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(1))
    latents = sampled(both, scheduler, noise, texts, (condition[None] / 255).bfloat16(), steps, GUIDANCE)
    picture = decoder((latents / 0.18215).bfloat16())[0][0].float()
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / "openvino.png")


def by_sdcpp(folder: Path, steps: int) -> None:
    """stable-diffusion.cpp through its Python binding, on single files that `main` has converted."""
    from PIL import Image
    from stable_diffusion_cpp import StableDiffusion

    pipeline = StableDiffusion(
        model_path=str(folder / "base.safetensors"), control_net_path=str(folder / "net.safetensors"),
        n_threads=os.cpu_count(), verbose=False,
    )  # fmt: skip
    (image,) = pipeline.generate_image(
        PROMPT, NEGATIVE, width=SIDE, height=SIDE, cfg_scale=GUIDANCE, sample_steps=steps, seed=1,
        control_image=Image.open(folder / "map.canny.png"), control_strength=1.0,
    )  # fmt: skip
    image.save(folder / "sdcpp.png")


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak GB of a process. The peak is its own and its children's largest."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[:4]} failed with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", default=",".join(DEFAULT))
    parser.add_argument("--folder", type=Path, help="where the models are kept (default: a temporary folder)")
    parser.add_argument("--small", action="store_true", help="narrow networks, to try the script")
    parser.add_argument("--row", choices=ROWS, help="one, in this process")
    parser.add_argument("--make", action="store_true", help="make the models alone")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    if args.make:
        make_models(folder, args.small)
        return
    if args.row:
        {"diffusers": by_diffusers, "openvino": by_openvino, "sdcpp": by_sdcpp}[args.row](folder, args.steps)
        return
    if not (folder / "base").is_dir():
        # In a process of its own: its memory would be counted as its children's.
        subprocess.run(
            [sys.executable, __file__, "--make", "--folder", str(folder), *["--small"] * args.small], check=True
        )
    if "sdcpp" in args.rows:
        for part in ("base", "net"):
            convert = ["models", "convert", folder / part, folder / f"{part}.safetensors", "--to", "original"]
            subprocess.run([sys.executable, "-m", "controlnet.cli.main", *map(str, convert), "--overwrite"], check=True)
    import torch

    commands = {
        "ours": ours(folder, args.steps), "ours-eager": ours(folder, args.steps, "--engine", "eager"),
        "ours-low": ours(folder, args.steps, "--low-memory"),
    }  # fmt: skip
    found = {}
    for row in args.rows.split(","):
        own = [sys.executable, __file__, "--row", row, "--folder", str(folder), "--steps", str(args.steps)]
        cache = {"CONTROLNET_CACHE": str(folder / "cache"), "DIFFUSERS_VERBOSITY": "error"}
        found[row] = [run(commands.get(row, own), cache) for _ in range(2 if row in KEEPING else 1)]
        print(f"{row}: {json.dumps(found[row])}", file=sys.stderr, flush=True)
    print(f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}, {args.steps} steps"
          f"{', small networks' if args.small else ''}\n")  # fmt: skip
    first = next(iter(found.values()))[-1]
    print("| an image, from the shell to the file | s | times ours | first run s | peak GB | times ours |")
    print("|---|---|---|---|---|---|")
    for row, runs in found.items():
        seconds, peak = runs[-1]
        once = f"{runs[0][0]:.1f}" if row in KEEPING else ""
        print(f"| {ROWS[row]} | {seconds:.1f} | {seconds / first[0]:.2f} | {once} | {peak:.2f} "
              f"| {peak / first[1]:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
