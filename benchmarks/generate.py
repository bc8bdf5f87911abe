"""An image at Stable Diffusion's size beside diffusers' pipeline: time of an evaluation, what more costs, peak memory.

    python benchmarks/generate.py [--parts speed,cost,memory] [--small]

SD 1.5's UNet and one ControlNet with random weights, zero convolutions filled, 512 x 512 pixels, guidance 7.5; text
features are given, and the latents are not decoded, so that the networks alone are compared. All variants take turns in
one process, with the same weights and noise: one round unmeasured, then ROUNDS; medians.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import gc
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

GUIDANCE = 7.5
PLOT = Path(__file__).parent / "cost.png"


class Networks:
    """A UNet and ControlNets of one number type and memory format, ours and as diffusers' pipeline."""

    def __init__(self, unet, nets, device, dtype, channels_last: bool):
        import torch
        from controlnet.model.control.upsampling import fold_upsampling
        from diffusers import (
            AutoencoderKL,
            ControlNetModel,
            DDIMScheduler,
            StableDiffusionControlNetPipeline,
            UNet2DConditionModel,
        )
        from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.device, self.dtype = device, dtype
        self.unet = copy.deepcopy(unet).to(device, dtype).to(memory_format=layout)
        self.nets = [copy.deepcopy(net).to(device, dtype).to(memory_format=layout) for net in nets]
        self.scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        )
        references = []
        for net in self.nets:
            with torch.device("meta"):
                reference = ControlNetModel.from_unet(
                    self.unet, load_weights_from_unet=False, conditioning_embedding_out_channels=net.hint_widths
                )
            reference.load_state_dict(net.state_dict(), assign=True)  # the same tensors: no memory of its own
            references.append(reference.eval())
        self.references = references
        with torch.device("meta"):
            self.own = UNet2DConditionModel.from_config(self.unet.config)
        self.own.load_state_dict(self.unet.state_dict(), assign=True)  # the same tensors, folded where that is quicker
        self.own.eval().requires_grad_(False)
        fold_upsampling(self.own)
        self.multi = MultiControlNetModel
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, **blocks)
        self.pipeline = StableDiffusionControlNetPipeline(
            vae=vae.to(device, dtype), text_encoder=None, tokenizer=None, unet=self.unet, controlnet=references[0],
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)

    def inputs(self, side: int, batch: int):
        import torch

        generator = torch.Generator().manual_seed(0)
        width = self.unet.config.cross_attention_dim
        noise = torch.randn(batch, 4, side // 8, side // 8, generator=generator)
        text, null = (torch.randn(n, 77, width, generator=generator).to(self.device, self.dtype) for n in (batch, 1))
        condition = (torch.rand(1, 3, side, side, generator=generator) < 0.05).to(self.device, self.dtype)
        return noise.to(self.device, self.dtype), text, null, condition

    def ours(self, steps: int, side: int = 512, batch: int = 1, nets: int = 1, engine=None):
        import torch
        from controlnet.model.control.prompt import Prompt
        from controlnet.model.sampling.loop import EAGER, ActiveNet, sample
        from controlnet.model.sampling.schedulers import make_scheduler
        from controlnet.model.sampling.starts import FromNoise

        noise, text, null, condition = self.inputs(side, batch)
        with torch.no_grad():
            applied = [ActiveNet(net, net.prepare(condition)) for net in self.nets[:nets]]
            own = make_scheduler(self.scheduler)
            prompt, negative, start = Prompt(text), Prompt(null), FromNoise(noise)
            return sample(self.own, own, start, prompt, negative, applied, steps, GUIDANCE, engine=engine or EAGER)

    def theirs(self, steps: int, side: int = 512, batch: int = 1, nets: int = 1):
        noise, text, null, condition = self.inputs(side, batch)
        own = self.references[:nets]
        self.pipeline.controlnet = own[0] if nets == 1 else self.multi(own)
        return self.pipeline(
            image=condition if nets == 1 else [condition] * nets, prompt_embeds=text, latents=noise,
            negative_prompt_embeds=null.expand_as(text), num_inference_steps=steps, guidance_scale=GUIDANCE,
            output_type="latent", height=side, width=side,
        ).images  # fmt: skip


def networks(small: bool, nets: int = 1):
    """(UNet, ControlNets) in float32 with random weights, zero convolutions filled."""
    import torch
    from controlnet.model.control.controlnet import ControlNet
    from controlnet.model.files.families import SD1
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    narrow = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8} if small else {}
    unet = UNet2DConditionModel.from_config(dict(SD1.unet) | narrow).eval().requires_grad_(False)
    made = []
    for _ in range(nets):
        net = ControlNet.from_base(unet).eval().requires_grad_(False)
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn_like(parameter))
        made.append(net)
    return unet, made


def wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable, device) -> float:
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def speed(args, device) -> None:
    import torch

    unet, nets = networks(args.small)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    plain, fast = (Networks(unet, nets, device, dtype, last)
                   for dtype, last in ((torch.float32, False), (half, True)))  # fmt: skip
    del unet, nets
    side = 128 if args.small else 512
    name = str(half).removeprefix("torch.")
    variants = {
        "diffusers as one gets it, float32": plain.theirs,
        f"diffusers tuned, {name}, channels_last": fast.theirs,
        f"ours, {name}, engine eager": fast.ours,
    }
    off = (plain.ours(1, side) - plain.theirs(1, side)).abs().max() / plain.theirs(1, side).std()
    variants |= graphs_of(fast, device, name, side)
    times: dict[str, list[float]] = {key: [] for key in variants}
    made = {}
    for turn in range(args.rounds + 1):
        for key, function in variants.items():
            steps = args.evaluations if turn else 1
            start = time.perf_counter()
            made[key] = function(steps, side)
            wait(device)
            seconds = (time.perf_counter() - start) / steps
            print(f"{key}: {seconds:.2f} s{'' if turn else ' (the first call)'}", file=sys.stderr)
            if turn:
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    tuned = medians[f"diffusers tuned, {name}, channels_last"]
    graph = medians.get(PEER, float("nan"))
    reference = made["diffusers as one gets it, float32"].float()
    print("| one evaluation, both halves of the guidance | median s | min s | times diffusers tuned | times OpenVINO | "
          "difference |\n|---|---|---|---|---|---|")  # fmt: skip
    for key, median in medians.items():
        rms = (made[key].float() - reference).std() / reference.std()
        print(f"| {key} | {median:.2f} | {min(times[key]):.2f} | {median / tuned:.2f} | {median / graph:.2f} "
              f"| {rms:.4f} |")  # fmt: skip
    print(
        f"\nAfter one evaluation in float32, ours and diffusers' differ by {off:.1e} of the standard deviation. In the"
        f" table: the deviation of the latents after {args.evaluations}, from diffusers in float32."
    )


def spare() -> str:
    """A folder until this process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


PEER = "OpenVINO alone, both networks one graph"


def graphs_of(both: Networks, device, name: str, side: int) -> dict[str, Callable]:
    """The rows of engines that make graphs, ours and what one would use instead."""
    import torch
    from controlnet.model.engines.choose import make_engine

    if device.type == "cuda":
        graphs, ours = make_engine("graphs"), make_engine("compiled")
        compiled = Networks(both.unet, both.nets, device, both.dtype, True)
        compiled.pipeline.unet = torch.compile(compiled.unet, fullgraph=True)
        compiled.references = [torch.compile(one, fullgraph=True) for one in compiled.references]
        return {
            f"ours, {name}, engine graphs": lambda n, side: both.ours(n, side, engine=graphs),
            f"ours, {name}, engine compiled": lambda n, side: both.ours(n, side, engine=ours),
            f"diffusers tuned and compiled, {name}": compiled.theirs,
        }
    if not find_spec("openvino"):
        return {}
    from peers import one_graph, sampled

    os.environ.setdefault("CONTROLNET_CACHE", spare())
    engine = make_engine("openvino", lambda text: print(text, file=sys.stderr))
    request = one_graph(both.unet, both.references, Path(spare()), side)
    noise, text, null, condition = both.inputs(side, 1)

    def peer(steps: int, side: int):
        return sampled(request, both.scheduler, noise, torch.cat([null, text]), condition, steps, GUIDANCE)

    return {f"ours, {name}, engine openvino": lambda n, side: both.ours(n, side, engine=engine), PEER: peer}


def cost(args, device) -> None:
    """One evaluation for more ControlNets, larger canvases and batches, ours and the best peer's."""
    import torch
    from controlnet.model.engines.choose import make_engine
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unet, nets = networks(args.small, 4)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    both = Networks(unet, nets, device, dtype, True)
    del unet, nets
    os.environ.setdefault("CONTROLNET_CACHE", spare())
    graphs = device.type == "cpu" and bool(find_spec("openvino"))
    peer = PEER if graphs else "diffusers tuned"
    axes = {
        "ControlNets": [(n, {"nets": n}) for n in (1, 2, 3, 4)],
        "pixels a side": [(side, {"side": side}) for side in (256, 512, 768, 1024, 1536)],
        "images at once": [(n, {"batch": n, "side": 256}) for n in (1, 2, 4, 8, 16)],
    }
    figure = Figure(figsize=(10, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    print(f"\n| | ours s | {peer} s | ratio |\n|---|---|---|---|")
    for plot, (what, points) in zip(figure.subplots(1, 3), axes.items(), strict=True):
        rows = []
        for value, options in points[:2] if args.small else points:
            engine = make_engine("openvino" if graphs else "graphs" if device.type == "cuda" else "eager")
            with tempfile.TemporaryDirectory() as folder:
                theirs = alone(both, Path(folder), **options) if graphs else partial(both.theirs, 1, **options)
                pair = []
                for function in (partial(both.ours, 1, engine=engine, **options), theirs):
                    seconds = [timed(function, device) for _ in range(args.rounds + 1)][1:]
                    pair.append(statistics.median(seconds))
            del theirs
            rows.append((value, *pair))
            more = " of 256 pixels" if what == "images at once" else ""
            print(f"| {value} {what}{more} | {pair[0]:.2f} | {pair[1]:.2f} | {pair[0] / pair[1]:.2f} |", flush=True)
        values, ours, theirs = zip(*rows, strict=True)
        plot.plot(values, theirs, marker="o", color="0.6", label=peer)
        plot.plot(values, ours, marker="o", color="tab:blue", label="ours")
        plot.set_xlabel(what), plot.set_ylim(bottom=0), plot.set_xticks(values)
        plot.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds an evaluation")
    figure.axes[0].legend(frameon=False, fontsize=8)
    if not args.small:
        figure.savefig(PLOT)


def alone(both: Networks, folder: Path, side: int = 512, batch: int = 1, nets: int = 1) -> Callable:
    """One evaluation by OpenVINO alone."""
    import torch
    from peers import one_graph, sampled

    request = one_graph(both.unet, both.references[:nets], folder, side, batch)
    noise, text, null, condition = both.inputs(side, batch)
    texts = torch.cat([null.expand_as(text), text])
    return lambda: sampled(request, both.scheduler, noise, texts, condition, 1, GUIDANCE)


def memory(args) -> None:
    """Peak memory of an image with and without what --low-memory does, in processes of their own."""
    print("\n| an image, decoded | seconds | peak GB |\n|---|---|---|")
    for side in (512, 768):
        for low in (False, True):
            command = [sys.executable, __file__, "--image", str(side), *["--low"] * low, *["--small"] * args.small]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(f"| {side} x {side}{', --low-memory' if low else ''} | {done.stdout.strip()} |", flush=True)


def image(args, device) -> None:
    """One image of three evaluations with SD 1.5's VAE; prints seconds and peak memory."""
    import torch
    from controlnet.model.base import Base
    from controlnet.model.control.prompt import Prompt
    from controlnet.model.control.strength import Strength
    from controlnet.model.files.families import VAE
    from controlnet.model.sampling.generate import Request, generate
    from diffusers import AutoencoderKL, DDIMScheduler

    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    unet, (net,) = networks(args.small)
    home = torch.device("cpu") if args.low else device
    vae = AutoencoderKL.from_config(VAE).eval()
    base = Base(
        name="random", path=Path(), unet=unet.to(home, dtype), vae=vae.to(home, dtype), encoders=[],
        scheduler=DDIMScheduler(), words=None, guidance=GUIDANCE, control_on="both", device=device, low_memory=args.low,
    )  # fmt: skip
    if args.low:
        base.vae.enable_tiling()
    zeros = torch.zeros(1, 77, 768, device=device, dtype=dtype)
    base.encode_text = lambda prompts, *more: Prompt(zeros).rows(len(prompts))  # type: ignore[method-assign]
    import numpy as np

    condition = np.zeros((args.image, args.image, 3), np.uint8)
    nets = [(net.to(home, dtype), Strength())]
    requests = [Request("a", 0, (condition,), negative="b")]
    del unet, net, vae
    gc.collect()
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the networks
    seconds = timed(lambda: next(generate(base, requests, nets, (args.image, args.image), 3)), device)
    status = Path("/proc/self/status").read_text()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * int(
        status.split("VmHWM:")[1].split()[0])  # fmt: skip
    print(f"{seconds:.1f} | {peak / 1e9:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed,cost,memory")
    parser.add_argument("--evaluations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="narrow networks, to try the script")
    parser.add_argument("--image", type=int, help="one image of so many pixels a side, in this process")
    parser.add_argument("--low", action="store_true", help="with what --low-memory does")
    args = parser.parse_args()
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.image:
        image(args, device)
        return
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    small = ", small networks" if args.small else ""
    print(f"{machine}, {platform.machine()}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
          f"{args.rounds} rounds of {args.evaluations}{small}\n", flush=True)  # fmt: skip
    for part, function in (("speed", speed), ("cost", cost)):
        if part in args.parts.split(","):
            function(args, device)
    if "memory" in args.parts.split(","):
        memory(args)


if __name__ == "__main__":
    main()
