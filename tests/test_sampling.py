"""The sampling loop against diffusers' ControlNet pipeline, and what it does not compute."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from controlnet.model.control.strength import Strength
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import SCHEDULERS, make_scheduler
from controlnet.model.sampling.starts import FromNoise
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from helpers import Counter

PROMPT = "a red cube on a blue floor"


@pytest.fixture(scope="module")
def base(small_base_folder):
    return load_base(str(small_base_folder / "base"))


@pytest.fixture(scope="module")
def net(small_base_folder):
    return load_controlnet(small_base_folder / "net")


@pytest.fixture(scope="module")
def condition():
    rng = np.random.default_rng(0)
    return np.repeat((rng.random((64, 64, 1)) < 0.1).astype(np.uint8) * 255, 3, 2)


def run(base, net, condition, dtype=torch.float64, scheduler="ddim", seeds=(5, 6), **options):
    start = FromNoise.seeded(list(seeds), (4, 8, 8))
    start.noise = start.noise.to(dtype)
    prompt = base.encode_text([PROMPT]).to(dtype).rows(len(seeds))
    negative = base.encode_text([""]).to(dtype)
    hint = net.prepare(condition_tensor(condition)[None].to(dtype))
    acting = {f.name: options.pop(f.name) for f in fields(Strength) if f.name in options}
    controls = [ActiveNet(net, hint, Strength(**acting))]
    steps = options.pop("steps", 10)
    own = make_scheduler(base.scheduler, scheduler)
    return sample(base.unet, own, start, prompt, negative, controls, steps, **options)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_parity_with_diffusers_pipeline(small_base_folder, condition, scheduler):
    """Latents after 10 steps in float64, two images, guidance 7.5."""
    folder = small_base_folder
    reference_net = ControlNetModel.from_pretrained(folder / "net").double()
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder / "base", controlnet=reference_net, safety_checker=None
    ).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    base = load_base(str(folder / "base"), dtype=torch.float64)
    net = load_controlnet(folder / "net", torch.float64)
    pipeline.scheduler = make_scheduler(base.scheduler, scheduler)
    start = FromNoise.seeded([5, 6], (4, 8, 8))
    with torch.no_grad():
        theirs = pipeline(
            [PROMPT] * 2, image=condition_tensor(condition)[None].double(), latents=start.noise.double(),
            guidance_scale=7.5, generator=start.generators,
            num_inference_steps=10, controlnet_conditioning_scale=0.8, output_type="latent", height=64, width=64,
        ).images  # fmt: skip
        ours = run(base, net, condition, scheduler=scheduler, scale=0.8)
        without = run(base, net, condition, scheduler=scheduler, scale=0.0)
    assert (ours - without).std() > 0.01 * ours.std()  # control is at work
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.std()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_runs_and_counts_its_evaluations(base, net, condition, name):
    seen = []
    latents = run(base, net, condition, torch.float32, name, steps=4, on_step=lambda done, of: seen.append((done, of)))
    assert torch.isfinite(latents).all()
    evaluations = {"pndm": 5, "heun": 7}.get(name, 4)
    assert seen == [(i + 1, evaluations) for i in range(evaluations)]


@pytest.mark.parametrize("name", ["ddim", "euler_a", "sde-dpm++", "lcm"])
def test_an_image_does_not_depend_on_its_batch(base, net, condition, name):
    """Noise bit for bit, latents to rounding, also for schedulers that draw noise at each step."""
    together, alone = (FromNoise.seeded(seeds, (4, 8, 8)).noise for seeds in ([5, 6, 7], [6]))
    assert torch.equal(together[1], alone[0])
    three = run(base, net, condition, torch.float32, name, (5, 6, 7), steps=5)
    one = run(base, net, condition, torch.float32, name, (6,), steps=5)
    assert (three[1] - one[0]).abs().max() <= 1e-4 * one.std()
    assert not torch.allclose(three[0], one[0], atol=0.1)


def test_pixels_agree_within_one_level(base, net, condition):
    def images(seeds):
        requests = [Request(PROMPT, seed, (condition,)) for seed in seeds]
        return dict(zip(seeds, generate(base, requests, [(net, Strength())], steps=4), strict=True))

    many = images([3, 4, 5, 6, 7])
    for seed in (3, 7):
        difference = many[seed].astype(int) - images([seed])[seed].astype(int)
        assert np.abs(difference).max() <= 1
    assert np.abs(many[3].astype(int) - many[4]).max() > 1


def test_guidance_one_skips_the_unconditional_half_and_the_hint_runs_once(base, net, condition):
    unet, hint = Counter(base.unet.conv_out), Counter(net.controlnet_cond_embedding)
    requests = [Request(PROMPT, seed, (condition,)) for seed in (1, 2)]
    list(generate(base, requests, [(net, Strength())], steps=3, guidance=1.0))
    assert unet.batches == [2, 2, 2]
    list(generate(base, requests, [(net, Strength())], steps=3, guidance=2.0))
    assert unet.batches[3:] == [4, 4, 4]
    assert hint.count == 2  # once a call, for both images, both halves and all steps
    unet.hook.remove(), hint.hook.remove()


@pytest.mark.parametrize(
    "acting, runs",
    [
        ({}, 10), ({"scale": 0.0}, 0), ({"end": 0.5}, 5), ({"start": 0.5}, 5), ({"start": 0.25, "end": 0.75}, 4),
        ({"end": 0.05}, 0), ({"start": 1.0}, 0), ({"start": 0.0, "end": 0.0}, 0),
    ],
)  # fmt: skip
def test_a_net_that_does_not_act_is_not_run(base, net, condition, acting, runs):
    """diffusers' rule: evaluation i of n acts iff i/n >= start and (i+1)/n <= end."""
    counter = Counter(net.conv_in)
    run(base, net, condition, torch.float32, **acting)
    assert counter.count == runs
    counter.hook.remove()


def test_controls_are_added(base, net, condition):
    one = run(base, net, condition, torch.float32, scale=2.0)
    hint = net.prepare(condition_tensor(condition)[None])
    prompt = base.encode_text([PROMPT]).rows(2)
    controls = [ActiveNet(net, hint, Strength(1.5)), ActiveNet(net, hint, Strength(0.5))]
    scheduler, negative = make_scheduler(base.scheduler, "ddim"), base.encode_text([""])
    start = FromNoise.seeded([5, 6], (4, 8, 8))
    two = sample(base.unet, scheduler, start, prompt, negative, controls, 10)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


@pytest.mark.parametrize("control_on", ["both", "cond"])
def test_halves_apart_are_the_halves_together(small_base_folder, condition, control_on):
    base = load_base(str(small_base_folder / "base"), dtype=torch.float64)
    net = load_controlnet(small_base_folder / "net", torch.float64)
    counter = Counter(base.unet.conv_out)
    together, apart = (
        run(base, net, condition, control_on=control_on, halves_apart=one, steps=3) for one in (False, True)
    )
    assert counter.batches == [4] * 3 + [2] * 6
    assert (together - apart).abs().max() <= 1e-9 * together.std()


def test_low_memory_makes_the_same_images_one_at_a_time(small_base_folder, base, net, condition):
    spare = load_base(str(small_base_folder / "base"), low_memory=True)
    counter = Counter(spare.unet.conv_in)
    requests = [Request(PROMPT, seed, (condition,)) for seed in (1, 2)]
    for usual, one in zip(*(generate(b, requests, [(net, Strength())], steps=2) for b in (base, spare)), strict=True):
        assert np.abs(usual.astype(int) - one).max() <= 1 and usual.std() > 1
    assert set(counter.batches) == {1} and spare.vae.use_tiling


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves networks to a GPU")
def test_low_memory_leaves_the_device_empty(small_base_folder):
    spare = load_base(str(small_base_folder / "base"), "cuda", low_memory=True)
    next(generate(spare, [Request(PROMPT, 1)], steps=1))
    assert {p.device.type for n in (spare.unet, spare.vae, spare.text_encoder) for p in n.parameters()} == {"cpu"}
