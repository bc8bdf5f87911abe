"""One training step, ours beside what people do instead: `make bench-train`.

    (a) ours: latents and text from the cache, the locked base without gradients of its own
        diffusers: as in its train_controlnet.py, VAE and text encoder in every step, ControlNetModel
    (b) tune: the same UNet fine-tuned without ControlNet (paper section 4: a ControlNet costs 34 % more time, 23 % more
        memory than that)
    (c) the time to read a batch from data sets of 100 to 100,000 pairs

Stable Diffusion 1.5's shapes, random weights, zero convolutions filled with random values, 512 x 512. Fused AdamW and
gradient clipping in all, no averaged weights. Each variant runs in a process of its own, so that its peak memory is its
own; warm-up first, medians and ratios.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = ("ours", "diffusers", "tune")


def models(small: bool):
    """UNet, VAE, text encoder of SD 1.5's shapes (or small ones, to try the script) with random weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    widths = (32, 64, 64, 64) if small else (320, 640, 1280, 1280)
    text_width = 64 if small else 768
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, cross_attention_dim=text_width, attention_head_dim=8
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
        block_out_channels=(32, 32, 32, 32) if small else (128, 256, 512, 512), layers_per_block=2,
    )  # fmt: skip
    vae.decoder = vae.post_quant_conv = None  # training never decodes
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=text_width, intermediate_size=4 * text_width, max_position_embeddings=77,
        num_hidden_layers=2 if small else 12, num_attention_heads=4 if small else 12,
    ))  # fmt: skip
    return unet, vae, text


def randomise(net) -> None:
    import torch

    for parameter in net.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)


def peak_bytes(device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_of(variant: str, args, device):
    """A function that does one optimiser step of a variant."""
    import torch
    import torch.nn.functional as F
    from controlnet.model.control.controlnet import ControlNet
    from controlnet.model.control.prompt import Prompt
    from controlnet.model.training.objective import Batch, NoiseSchedule, control_losses
    from controlnet.model.training.precision import autocast
    from controlnet.model.training.recorded import Recorded
    from diffusers import ControlNetModel, DDPMScheduler

    with device:  # to draw random weights takes a CPU longer than all else
        unet, vae, text = models(args.small)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(1)
    b = args.batch
    pixels = torch.randn(b, 3, 512, 512, generator=generator).clamp(-1, 1).to(device)
    condition = (torch.rand(b, 3, 512, 512, generator=generator) < 0.05).float().to(device)
    ids = torch.randint(0, 49000, (b, 77), generator=generator).to(device)
    latents = torch.randn(b, 4, 64, 64, generator=generator).to(device)
    embeddings = torch.randn(b, 77, unet.config.cross_attention_dim, generator=generator).to(device)
    t = torch.randint(0, 1000, (b,), generator=generator).to(device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[args.precision]

    if variant == "ours":
        del vae, text
        net = ControlNet.from_base(unet)
        unet.requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
        trained = net.to(device, memory_format=torch.channels_last)
        diffusion = NoiseSchedule(scheduler, device)
        inputs = condition.contiguous(memory_format=torch.channels_last)

        def losses(*tensors):
            with autocast(device, args.precision):
                return control_losses(unet, net, diffusion, Batch.of(*tensors))

        recorded = Recorded(net, losses)

        def loss():
            batch = Batch(latents, torch.randn_like(latents), t, Prompt(embeddings), inputs)
            return recorded(*batch.tensors).mean()
    else:
        vae.requires_grad_(False).to(device, dtype), text.requires_grad_(False).to(device, dtype)
        net = ControlNetModel.from_unet(unet) if variant == "diffusers" else None
        trained = (net if net is not None else unet).to(device).train()
        if net is not None:
            unet.requires_grad_(False).to(device, dtype)

        def loss():
            if args.cached:
                z0, states = latents, embeddings
            else:
                with torch.no_grad():
                    z0 = vae.encode(pixels.to(dtype)).latent_dist.sample().float() * 0.18215
                    states = text(ids)[0]
            noise = torch.randn_like(z0)
            z = scheduler.add_noise(z0, noise, t)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                residuals = {}
                if net is not None:
                    down, middle = net(z, t, encoder_hidden_states=states, controlnet_cond=condition, return_dict=False)
                    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                predicted = unet(z, t, encoder_hidden_states=states, **residuals).sample
            return F.mse_loss(predicted.float(), noise)

    randomise(trained)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(args) -> None:
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = step_of(args.variant, args, device)
    seconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(json.dumps({"seconds": seconds[args.warmup :], "peak": peak_bytes(device), "machine": name,
                      "torch": torch.__version__}))  # fmt: skip


def read_times(counts=(100, 1_000, 10_000, 100_000), batch: int = 4, reads: int = 200) -> list[tuple[int, float]]:
    """Milliseconds to read a batch from data sets of several sizes: 100 real pictures under many entries."""
    import numpy as np
    from controlnet.model.load import load_base
    from controlnet.model.training.cache import Cache
    from controlnet.model.training.config import TrainConfig
    from controlnet.model.training.samples import Samples
    from controlnet.preprocessors.data.pairs import Pair
    from controlnet.preprocessors.files import write_file
    from controlnet.preprocessors.images import png_bytes

    base = load_base("tiny")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(100):
            picture = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            write_file(Path(folder) / f"{i}.png", png_bytes(picture))
        pairs = [Pair(Path(folder) / f"{i}.png", None, f"picture {i}") for i in range(100)]
        cache = Cache(Path(folder) / "cache")
        config = TrainConfig(kind="canny", batch_size=batch)
        Samples(pairs, config, base, "x", cache).prepare(range(100))
        for count in counts:
            samples = Samples(pairs * (count // 100), config, base, "x", cache)
            samples.batch(0)
            times = []
            for k in range(1, reads + 1):
                start = time.perf_counter()
                samples.batch(k)
                times.append(time.perf_counter() - start)
            rows.append((count, 1000 * statistics.median(times)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, help="measure one, in this process")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--small", action="store_true", help="small networks, to try the script")
    parser.add_argument("--no-reading", action="store_true", help="leave out the time to read batches")
    parser.add_argument("--cached", action="store_true", help="give the others latents and texts too")
    args = parser.parse_args()
    if args.variant:
        measure(args)
        return
    found = {}
    for variant in VARIANTS:
        # Tuning the UNet gets its latents and texts for nothing: only the networks are compared.
        cached = ["--cached"] if variant == "tune" else []
        print(f"measuring {variant} ...", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--variant", variant, *cached], stdout=subprocess.PIPE, text=True
        )
        found[variant] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        if done.returncode:
            print(f"{variant} failed with {done.returncode} (-9: out of memory)", file=sys.stderr)
    ours = found["ours"]
    first = statistics.median(ours["seconds"])
    print(f"{ours['machine']}, {platform.machine()}, torch {ours['torch']}, {args.precision}, batch {args.batch}, "
          f"{args.steps} steps after {args.warmup}{', small networks' if args.small else ''}\n")  # fmt: skip
    print("| one step | median s | min s | times ours | peak GB | times ours |\n|---|---|---|---|---|---|")
    names = {"ours": "ours, cached", "diffusers": "as diffusers' train_controlnet.py", "tune": "the UNet tuned, cached"}
    for variant, result in found.items():
        if result is None:
            print(f"| {names[variant]} | failed | | | | |")
            continue
        median = statistics.median(result["seconds"])
        print(f"| {names[variant]} | {median:.2f} | {min(result['seconds']):.2f} | {median / first:.2f} "
              f"| {result['peak'] / 1e9:.2f} | {result['peak'] / ours['peak']:.2f} |")  # fmt: skip
    if args.no_reading:
        return
    print("\n| pairs | ms to read a batch of 4 |\n|---|---|")
    for count, milliseconds in read_times():
        print(f"| {count:,} | {milliseconds:.2f} |")


if __name__ == "__main__":
    main()
