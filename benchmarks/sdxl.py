"""SDXL at full size beside diffusers' pipelines: a ControlNet, and a union with two conditions; time of an evaluation.

    python benchmarks/sdxl.py [--side 1024] [--rounds 2] [--small]

SDXL's own UNet, ControlNet and union (6 types) with random weights, zero convolutions filled, in bfloat16 on a CPU,
channels_last on both sides; guidance 5, both halves. Text features are given, and the latents are not decoded. Both
take turns in one process, with the same tensors and noise: one round unmeasured, then --rounds; medians.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import resource
import statistics
import sys
import time
from types import SimpleNamespace

import diffusers
import torch
from controlnet.model.control.controlnet import ControlNet, copied_parts
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.strength import Strength
from controlnet.model.control.union import ControlNetUnion
from controlnet.model.files.families import SDXL
from controlnet.model.sampling.loop import EAGER, ActiveNet, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    UNet2DConditionModel,
)

GUIDANCE, SCALES, TYPES = 5.0, [0.8, 0.6], [0, 1]
SMALL = {
    "block_out_channels": (32, 64, 64), "norm_num_groups": 8, "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2), "sample_size": 16,
}  # fmt: skip


def random_network(make, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A network without memory for its first numbers, then random ones of a size that keeps the features finite."""
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return network.to(memory_format=torch.channels_last)


class Networks:
    """A UNet, a ControlNet and a union, ours and as diffusers' pipelines: the same tensors."""

    @torch.no_grad()
    def __init__(self, device: torch.device, dtype: torch.dtype, small: bool):
        self.device, self.dtype = device, dtype
        config = dict(SDXL.unet) | (SMALL if small else {})
        self.unet = random_network(lambda: UNet2DConditionModel.from_config(config), device, dtype)
        keys = inspect.signature(ControlNetUnionModel.__init__).parameters
        own = {key: value for key, value in config.items() if key in keys}
        width = config["block_out_channels"][0]
        more = {"num_control_type": 6, "num_trans_channel": width, "num_proj_channel": width}
        self.plain = random_network(lambda: ControlNetModel(**own), device, dtype)
        self.several = random_network(lambda: ControlNetUnionModel(**own, **more), device, dtype)
        self.net = as_ours(self.plain, ControlNet)
        self.union = as_ours(self.several, ControlNetUnion)
        self.scheduler = EulerDiscreteScheduler.from_config(SDXL.scheduler("epsilon"))
        vae = AutoencoderKL.from_config(dict(SDXL.vae) | {"block_out_channels": (4,) * 4, "norm_num_groups": 2})
        parts = dict(
            vae=vae.to(device, dtype), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
            unet=self.unet, scheduler=self.scheduler, add_watermarker=False,
        )  # fmt: skip
        self.pipelines = [
            StableDiffusionXLControlNetPipeline(**parts, controlnet=self.plain),
            StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=self.several),
        ]
        for pipeline in self.pipelines:
            pipeline.set_progress_bar_config(disable=True)

    def inputs(self, side: int, batch: int = 1):
        generator = torch.Generator().manual_seed(0)
        pooled = self.unet.config.projection_class_embeddings_input_dim - 6 * self.unet.config.addition_time_embed_dim

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        texts = [random(batch, *shape) for shape in ((77, 2048), (pooled,)) * 2]
        maps = [(torch.rand(1, 3, side, side, generator=generator) < 0.05).to(self.device, self.dtype) for _ in TYPES]
        return random(batch, 4, side // 8, side // 8), texts, maps

    @torch.no_grad()
    def ours(self, steps: int, side: int, union: bool = False, engine=EAGER, batch: int = 1) -> torch.Tensor:
        noise, (text, pooled, null, null_pooled), maps = self.inputs(side, batch)
        net, count = (self.union, 2) if union else (self.net, 1)
        rows = list(zip(maps, SCALES, TYPES, strict=True))[:count]
        acting = [ActiveNet(net, net.prepare(map_), Strength(scale), type_) for map_, scale, type_ in rows]
        ids = torch.tensor([[side, side, 0, 0, side, side]] * batch, dtype=torch.float32, device=self.device)
        prompt, negative = (Prompt(*pair, ids) for pair in ((text, pooled), (null, null_pooled)))
        own = make_scheduler(self.scheduler)
        start = FromNoise(noise)
        return sample(self.unet, own, start, prompt, negative, acting, steps, GUIDANCE, engine=engine)

    def theirs(self, steps: int, side: int, union: bool = False, batch: int = 1) -> torch.Tensor:
        noise, (text, pooled, null, null_pooled), maps = self.inputs(side, batch)
        if union:
            given = {"control_image": maps, "control_mode": TYPES,
                     "controlnet_conditioning_scale": SCALES}  # fmt: skip
        else:
            given = {"image": maps[0], "controlnet_conditioning_scale": SCALES[0]}
        return self.pipelines[union](
            prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=null,
            negative_pooled_prompt_embeds=null_pooled, latents=noise, num_inference_steps=steps,
            guidance_scale=GUIDANCE, output_type="latent", height=side, width=side, **given,
        ).images  # fmt: skip


def as_ours(network: torch.nn.Module, form: type[ControlNet]) -> ControlNet:
    """Our network around the tensors of diffusers'."""
    config = dict(network.config)
    parts = {part: getattr(network, part) for part in copied_parts(config)}
    with torch.device("meta"):
        ours = form(SimpleNamespace(config=config, **parts), "released", config["conditioning_embedding_out_channels"])
    ours.load_state_dict(network.state_dict(), assign=True)
    return ours.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--evaluations", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", help="(default: float16 on a GPU, else bfloat16)")
    parser.add_argument("--small", action="store_true", help="narrow networks, to try the script")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "bfloat16"))
    networks = Networks(device, dtype, args.small)
    steps, side = args.evaluations, args.side
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}, {side} x {side}\n")  # fmt: skip
    print("| one evaluation, both halves of the guidance | ours s | diffusers tuned s | ratio | difference |")
    print("|---|---|---|---|---|")
    for union, name in ((False, "one ControlNet"), (True, "a union with two conditions")):
        times: dict[bool, list[float]] = {False: [], True: []}
        made = {}
        for turn in range(args.rounds + 1):
            for own, function in ((True, networks.ours), (False, networks.theirs)):
                start = time.perf_counter()
                made[own] = function(steps, side, union).float()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = (time.perf_counter() - start) / steps
                print(f"{name}, {'ours' if own else 'diffusers'}: {seconds:.2f} s", file=sys.stderr)
                if turn:
                    times[own].append(seconds)
        ours, theirs = (statistics.median(times[own]) for own in (True, False))
        off = (made[True] - made[False]).abs().max() / made[False].std()
        print(f"| {name} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {off:.1e} |", flush=True)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\nPeak memory of both together: {peak / 1e9:.1f} GB.")


if __name__ == "__main__":
    main()
