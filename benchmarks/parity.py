"""How far our images are from diffusers': schedulers x modes x families, the same weights, noise and schedule.

Narrow random networks of each family, zero convolutions filled with random numbers; the largest difference of the
latents after 10 steps, in standard deviations of the reference. Writes benchmarks/parity.md and exits with 1 where a
row is beyond its limit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.modes import MODES
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.strength import SOFT, Strength
from controlnet.model.files.families import SUPPORTED, VAE, Family, scheduler_config
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import SCHEDULERS, make_scheduler
from controlnet.model.sampling.starts import FromNoise
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
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
        self.net = ControlNet.from_base(self.unet, hint_widths=(4, 8, 8, 16)).eval().requires_grad_(False)
        for parameter in self.net.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn_like(parameter))
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
    def difference(self, scheduler: str, mode: str, dtype: torch.dtype) -> tuple[int, float]:
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
        ours = sample(self.unet, own, start, Prompt(text), Prompt(null), applied, STEPS, GUIDANCE)

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


def main() -> None:
    import diffusers
    from controlnet.model.work.machine import silence_libraries

    silence_libraries()
    lines, beyond = [], 0
    for family in SUPPORTED:
        pair = Pair(family)
        for scheduler in SCHEDULERS:
            cells = []
            for mode in MODES:
                for dtype, limit in LIMITS.items():
                    evaluations, off = pair.difference(scheduler, mode, dtype)
                    beyond += not off <= limit
                    cells.append(f"{off:.1e}" if off <= limit else f"**{off:.1e}**")
            lines.append(f"| {family.name} | {scheduler} | {evaluations} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr)
    columns = [f"{mode} {str(dtype).removeprefix('torch.')}" for mode in MODES for dtype in LIMITS]
    verdict = f"{beyond} are beyond them (bold)." if beyond else "Every row is within them."
    text = f"""# Parity with diffusers

`make parity`, torch {torch.__version__}, diffusers {diffusers.__version__}. Latents after {STEPS} steps against
`StableDiffusionControlNetPipeline`: guidance {GUIDANCE}, scale {SCALE}, two images of {CANVAS} x {CANVAS} pixels,
narrow random networks of each family with random zero convolutions. Largest difference, in standard deviations of the
reference; limits: 1e-9 in float64, 1e-4 in float32. {verdict}

The pipeline has the mode `balanced` and, with `guess_mode`, control in the conditional half; weightings that it does
not have are multiplied onto its ControlNet's residuals, from their definitions. "Evaluations" is what {STEPS} steps
cost.

| family | scheduler | evaluations | {" | ".join(columns)} |
|---|---|---|{"---|" * len(columns)}
""" + "\n".join(lines)
    (Path(__file__).parent / "parity.md").write_text(text + "\n")
    raise SystemExit(beyond > 0)


if __name__ == "__main__":
    main()
