"""How far our images are from diffusers': schedulers x modes x families, the same weights, noise and schedule; for SDXL
also one net, two nets, unions with one and two conditions, with and without a negative prompt.

Narrow random networks of each family, zero convolutions filled with random numbers; the largest difference of the
latents after 10 steps, in standard deviations of the reference. Writes benchmarks/parity.md and exits with 1 where a
row is beyond its limit.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from controlnet.model.control.controlnet import ControlNet, copied_parts
from controlnet.model.control.modes import MODES
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.strength import Strength
from controlnet.model.control.union import ControlNetUnion
from controlnet.model.control.weighting import SOFT
from controlnet.model.engines.engine import Eager, Engine
from controlnet.model.engines.graphs import Compiled
from controlnet.model.engines.openvino import OpenVino
from controlnet.model.files.families import SD1, SD2, SDXL, VAE, Family, scheduler_config
from controlnet.model.sampling.loop import EAGER, ActiveNet, sample
from controlnet.model.sampling.schedulers import SCHEDULERS, make_scheduler
from controlnet.model.sampling.starts import FromNoise
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    UNet2DConditionModel,
)

STEPS, SEEDS, GUIDANCE, SCALE, CANVAS = 10, [5, 6], 7.5, 0.8, 128
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
SIDES = [16] * 3 + [8] * 3 + [4] * 3 + [2] * 4
"""Of the 13 connections at this canvas."""
WEIGHTS = {
    "uniform": [1.0] * 13,
    "soft": [SOFT ** (12 - i) for i in range(13)],
    "resolution": [SIDES[-1] / side for side in SIDES],
}


class Weighted(ControlNetModel):
    """diffusers' ControlNet with a weight on each residual, for the modes that its pipeline does not have."""

    weights: list[float]

    def forward(self, *args, **kwargs):
        down, middle = super().forward(*args, **(kwargs | {"guess_mode": False}))
        *first, last = self.weights
        return [w * r for w, r in zip(first, down, strict=True)], last * middle


class Pair:
    """A base and a ControlNet of a family, narrow and random, in our form and as diffusers' pipeline."""

    def __init__(self, family: Family):
        torch.manual_seed(0)
        heads = 2 if family.unet["attention_head_dim"] == 8 else (2, 4, 4, 4)
        narrow = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "attention_head_dim": heads}
        config = dict(family.unet) | narrow | {"sample_size": 16, "cross_attention_dim": 24}
        self.unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
        self.net = filled(ControlNet.from_base(self.unet, hint_widths=(4, 8, 8, 16)))
        reference = Weighted.from_unet(self.unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
        reference.load_state_dict(self.net.state_dict())
        prediction = "v_prediction" if family.name == "SD 2.x" else "epsilon"
        self.scheduler = DDIMScheduler.from_config(scheduler_config(prediction))
        self.pipeline = StableDiffusionControlNetPipeline(
            vae=AutoencoderKL.from_config(VAE | {"block_out_channels": (4,) * 4, "norm_num_groups": 2}),
            text_encoder=None, tokenizer=None, unet=self.unet, controlnet=reference, scheduler=self.scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        self.text, self.null = torch.randn(2, 7, 24), torch.randn(1, 7, 24)
        self.condition = (torch.rand(1, 3, CANVAS, CANVAS) < 0.1).float()

    @torch.no_grad()
    def difference(self, scheduler: str, mode: str, dtype: torch.dtype, engine: Engine = EAGER) -> tuple[int, float]:
        """(evaluations, largest difference in standard deviations)."""
        settings = MODES[mode]
        for network in (self.unet, self.net, self.pipeline.controlnet, self.pipeline.vae):
            torch.nn.Module.to(network, dtype)
        text, null, condition = self.text.to(dtype), self.null.to(dtype), self.condition.to(dtype)
        start = FromNoise.seeded(SEEDS, (4, CANVAS // 8, CANVAS // 8))
        start.noise = start.noise.to(dtype)
        strength = Strength(SCALE, weighting=settings.weighting, control_on=settings.control_on)
        applied = [ActiveNet(self.net, self.net.prepare(condition), strength)]
        own = make_scheduler(self.scheduler, scheduler)
        prompt, negative = Prompt(text), Prompt(null)
        ours = sample(self.unet, own, start, prompt, negative, applied, STEPS, GUIDANCE, engine=engine)

        self.pipeline.scheduler = make_scheduler(self.scheduler, scheduler)
        self.pipeline.controlnet.weights = WEIGHTS[settings.weighting]
        start = FromNoise.seeded(SEEDS, (4, CANVAS // 8, CANVAS // 8))
        theirs = self.pipeline(
            image=condition, prompt_embeds=text, negative_prompt_embeds=null.expand_as(text),
            latents=start.noise.to(dtype), generator=start.generators,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
            controlnet_conditioning_scale=SCALE, guess_mode=settings.control_on == "cond", height=CANVAS, width=CANVAS,
        ).images  # fmt: skip
        return len(own.timesteps), float((ours - theirs).abs().max() / theirs.std())


XL_CANVAS = (136, 72)
XL_SCALES = (0.8, 0.5)
WAYS = {
    "one net": (1, "both"), "one net, cond half": (1, "cond"), "two nets": (2, "both"), "union, one type": (1, "both"),
    "union, two types": (2, "both"),
}  # fmt: skip
"""Column -> conditions, and the halves of the guidance. The union pipeline fails in diffusers' own guess mode."""


class PairXL:
    """The same of SDXL: a base, two ControlNets and a union, and diffusers' pipelines."""

    def __init__(self):
        torch.manual_seed(0)
        narrow = {
            "block_out_channels": (16, 32, 32), "norm_num_groups": 8, "attention_head_dim": (2, 4, 4),
            "sample_size": 16, "cross_attention_dim": 24, "transformer_layers_per_block": (1, 1, 2),
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20,
        }  # fmt: skip
        self.unet = UNet2DConditionModel.from_config(dict(SDXL.unet) | narrow).eval().requires_grad_(False)
        widths = (4, 8, 8, 16)
        self.nets = [filled(ControlNet.from_base(self.unet, hint_widths=widths)) for _ in range(2)]
        references = [
            ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=widths) for _ in range(2)
        ]
        for reference, net in zip(references, self.nets, strict=True):
            reference.load_state_dict(net.state_dict())
        names = set(inspect.signature(ControlNetUnionModel.__init__).parameters) - {"self"}
        config = {key: value for key, value in references[0].config.items() if key in names}
        union = ControlNetUnionModel(**config, num_control_type=6, num_trans_channel=16, num_proj_channel=16)
        parts = {part: copy.deepcopy(getattr(union, part)) for part in copied_parts(union.config)}
        encoder = SimpleNamespace(config=dict(union.config), **parts)
        self.union = ControlNetUnion(encoder, "released", widths).eval().requires_grad_(False)
        self.union.load_state_dict(filled(union).state_dict())
        self.scheduler = EulerDiscreteScheduler.from_config(SDXL.scheduler("epsilon"))
        parts = dict(
            vae=AutoencoderKL.from_config(dict(SDXL.vae) | {"block_out_channels": (4,) * 4, "norm_num_groups": 2}),
            text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=self.unet,
            scheduler=self.scheduler, add_watermarker=False,
        )  # fmt: skip
        plain = StableDiffusionXLControlNetPipeline
        self.pipelines = {
            "one net": plain(**parts, controlnet=references[0]),
            "two nets": plain(**parts, controlnet=MultiControlNetModel(references)),
            "union": StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=union),
        }
        for pipeline in self.pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        self.text, self.null = torch.randn(2, 7, 24), torch.randn(1, 7, 24)
        self.pooled, self.null_pooled = torch.randn(2, 20), torch.randn(1, 20)
        self.conditions = [(torch.rand(1, 3, *XL_CANVAS[::-1]) < 0.1).float() for _ in range(2)]

    @torch.no_grad()
    def difference(
        self, scheduler: str, way: str, negative: bool, dtype: torch.dtype, engine: Engine = EAGER
    ) -> tuple[int, float]:
        """(evaluations, largest difference in standard deviations); without a negative prompt, zeros in its place. One
        image, since diffusers' union lets the images of a batch see each other."""
        count, halves = WAYS[way]
        pipeline = self.pipelines[way.split(",")[0]]
        for network in (self.unet, self.union, *self.nets, pipeline.controlnet, pipeline.vae):
            torch.nn.Module.to(network, dtype)
        text, pooled = self.text[:1].to(dtype), self.pooled[:1].to(dtype)
        null, null_pooled = (t.to(dtype) * negative for t in (self.null, self.null_pooled))
        conditions = [condition.to(dtype) for condition in self.conditions[:count]]
        width, height = XL_CANVAS
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        types = [1, 3][:count]
        nets = [self.union] * count if way.startswith("union") else self.nets[:count]
        strengths = [Strength(scale) for scale in XL_SCALES]
        if halves == "cond":  # diffusers' guess mode has weights of its own, from 0.1 to 1, times the scale in float32
            weights = XL_SCALES[0] * torch.logspace(-1, 0, 10)
            strengths = [Strength(weighting=tuple(weights.tolist()), control_on="cond")]
        applied = [
            ActiveNet(net, net.prepare(condition), strength, type_)
            for net, condition, strength, type_ in zip(nets, conditions, strengths, types, strict=False)
        ]
        shape = (4, height // 8, width // 8)
        start = FromNoise.seeded(SEEDS[:1], shape)
        start.noise = start.noise.to(dtype)
        own = make_scheduler(self.scheduler, scheduler)
        prompt, other = Prompt(text, pooled, ids), Prompt(null, null_pooled, ids)
        ours = sample(self.unet, own, start, prompt, other, applied, STEPS, GUIDANCE, engine=engine)

        pipeline.scheduler = make_scheduler(self.scheduler, scheduler)
        start = FromNoise.seeded(SEEDS[:1], shape)
        embeddings = {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled} if negative else {}
        if way.startswith("union"):
            given = {"control_image": conditions, "control_mode": types,
                     "controlnet_conditioning_scale": list(XL_SCALES[:count])}  # fmt: skip
        else:
            several = count > 1
            given = {"image": conditions if several else conditions[0], "guess_mode": halves == "cond",
                     "controlnet_conditioning_scale": list(XL_SCALES) if several else XL_SCALES[0]}  # fmt: skip
        theirs = pipeline(
            prompt_embeds=text, pooled_prompt_embeds=pooled, latents=start.noise.to(dtype), generator=start.generators,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", width=width, height=height,
            **embeddings, **given,
        ).images  # fmt: skip
        return len(own.timesteps), float((ours - theirs).abs().max() / theirs.std())


@torch.no_grad()
def filled(network: torch.nn.Module) -> torch.nn.Module:
    """With random numbers in place of zeros."""
    for parameter in network.eval().requires_grad_(False).parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return network


class Table:
    """Rows of differences; those beyond their limit are bold, and counted."""

    def __init__(self, first: str, columns: list[str]):
        names = [f"{column} {str(dtype).removeprefix('torch.')}" for column in columns for dtype in LIMITS]
        self.lines = [
            f"| {first} | scheduler | evaluations | {' | '.join(names)} |",
            f"|---|---|---|{'---|' * len(names)}",
        ]
        self.beyond = 0

    def add(self, name: str, scheduler: str, differences: list[tuple[int, float]]) -> None:
        cells = []
        for (_, off), limit in zip(differences, list(LIMITS.values()) * len(differences), strict=False):
            self.beyond += not off <= limit
            cells.append(shown(off, limit))
        self.lines.append(f"| {name} | {scheduler} | {differences[0][0]} | {' | '.join(cells)} |")
        print(self.lines[-1], file=sys.stderr)


def shown(off: float, limit: float) -> str:
    return f"{off:.1e}" if off <= limit else f"**{off:.1e}**"


def engines(networks: PairXL) -> list[tuple[str, list[float]]]:
    """Differences by engine: two modes of SD 1.x, SD 2.x, and three ways of SDXL."""
    os.environ["CONTROLNET_CACHE"] = tempfile.mkdtemp()
    makers = {"eager": Eager, "compiled": lambda: Compiled("aot_eager")}
    if find_spec("openvino"):
        makers["openvino"] = lambda: OpenVino(lambda text: print(text, file=sys.stderr))
    rows = []
    for name, make in makers.items():
        offs = []
        for family, mode in ((SD1, "balanced"), (SD1, "control"), (SD2, "balanced")):
            offs.append(Pair(family).difference("ddim", mode, torch.float32, make())[1])
        for way in ("one net", "two nets", "union, two types"):
            offs.append(networks.difference("ddim", way, True, torch.float32, make())[1])
        rows.append((name, offs))
        print(name, offs, file=sys.stderr)
    return rows


def main() -> None:
    import diffusers
    from controlnet.model.work.machine import silence_libraries

    silence_libraries()
    sd = Table("family", list(MODES))
    for family in (SD1, SD2):
        pair = Pair(family)
        for scheduler in SCHEDULERS:
            sd.add(family.name, scheduler, [pair.difference(scheduler, m, d) for m in MODES for d in LIMITS])
    xl, networks = Table("negative prompt", list(WAYS)), PairXL()
    for negative in (True, False):
        for scheduler in SCHEDULERS:
            row = [networks.difference(scheduler, way, negative, d) for way in WAYS for d in LIMITS]
            xl.add("given" if negative else "none", scheduler, row)
    graphs, limit = engines(networks), LIMITS[torch.float32]
    beyond = sd.beyond + xl.beyond + sum(off > limit for _, offs in graphs for off in offs)
    verdict = f"{beyond} are beyond them (bold)." if beyond else "Every figure is within them."
    text = f"""# Parity with diffusers

`make parity`, torch {torch.__version__}, diffusers {diffusers.__version__}. Latents after {STEPS} steps: guidance
{GUIDANCE}, narrow random networks of each family with random zero convolutions. Largest difference, in standard
deviations of the reference; limits: 1e-9 in float64, 1e-4 in float32. {verdict} "Evaluations" is what {STEPS} steps
cost.

## Stable Diffusion 1.x and 2.x

Against `StableDiffusionControlNetPipeline`, scale {SCALE}, two images of {CANVAS} x {CANVAS} pixels. The pipeline has
the mode `balanced` and, with `guess_mode`, control in the conditional half; weightings that it does not have are
multiplied onto its ControlNet's residuals, from their definitions.

{chr(10).join(sd.lines)}

## SDXL

Against `StableDiffusionXLControlNetPipeline` and `StableDiffusionXLControlNetUnionPipeline`, scales {XL_SCALES[0]} and
{XL_SCALES[1]}, an image of {XL_CANVAS[0]} x {XL_CANVAS[1]} pixels (an odd number of latent cells either way). Without a
negative prompt both take zeros, as SDXL was trained.

{chr(10).join(xl.lines)}

## Engines

Every engine of a CPU, float32, against the same pipelines; what `compiled` compiles is run by torch here, operation by
operation (`aot_eager`).

| engine | SD 1.x | SD 1.x, control mode | SD 2.x | SDXL, one net | SDXL, two nets | SDXL, union, two types |
|---|---|---|---|---|---|---|
{chr(10).join(f"| {name} | {' | '.join(shown(off, limit) for off in offs)} |" for name, offs in graphs)}
"""
    (Path(__file__).parent / "parity.md").write_text(text)
    raise SystemExit(beyond > 0)


if __name__ == "__main__":
    main()
