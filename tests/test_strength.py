"""How control is applied: weightings, schedules, regions, halves of the guidance, several ControlNets."""

import numpy as np
import pytest
import torch
from controlnet.model.control.controlnet import Control
from controlnet.model.control.strength import Strength
from controlnet.model.control.weighting import weights_of
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.model.work.condition import ConditionFlag, check_weighting, check_window
from controlnet.preprocessors.errors import UsageError
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from helpers import Counter, randomise
from hypothesis import given
from hypothesis import strategies as st

PROMPT = "a red cube on a blue floor"
GUIDANCE = 7.5
EVALUATIONS = 10


@pytest.fixture(scope="module")
def base(small_base_folder):
    return load_base(str(small_base_folder / "base"), dtype=torch.float64)


@pytest.fixture(scope="module")
def nets(small_base_folder):
    """Two ControlNets that do different things."""
    one, two = (load_controlnet(small_base_folder / "net", torch.float64) for _ in range(2))
    for module in (*two.controlnet_down_blocks, two.controlnet_mid_block):
        module.weight.data.zero_()
    return one, randomise(two, seed=7)


@pytest.fixture(scope="module")
def conditions():
    rng = np.random.default_rng(0)
    return [np.repeat((rng.random((64, 64, 1)) < p).astype(np.uint8) * 255, 3, 2) for p in (0.1, 0.4)]


def ours(base, nets, conditions, *strengths, steps=EVALUATIONS, scheduler="ddim"):
    start = FromNoise.seeded([5, 6], (4, 8, 8))
    start.noise = start.noise.double()
    controls = [
        ActiveNet(net, net.prepare(condition_tensor(condition)[None].double()), strength)
        for net, condition, strength in zip(nets, conditions, strengths, strict=False)
    ]
    prompt, negative = base.encode_text([PROMPT] * 2), base.encode_text([""])
    own = make_scheduler(base.scheduler, scheduler)
    with torch.no_grad():
        return sample(base.unet, own, start, prompt, negative, controls, steps, GUIDANCE)


def theirs(folder, base, nets, conditions, **options):
    """diffusers' pipeline with the same weights, noise and schedule."""
    references = []
    for net in nets:
        reference = ControlNetModel.from_pretrained(folder / "net").double()
        reference.load_state_dict(net.state_dict())
        references.append(reference)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder / "base", controlnet=MultiControlNetModel(references), safety_checker=None
    ).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(base.scheduler, "ddim")
    noise = FromNoise.seeded([5, 6], (4, 8, 8)).noise
    images = [condition_tensor(condition)[None].double() for condition in conditions[: len(nets)]]
    with torch.no_grad():
        return pipeline(
            [PROMPT] * 2, image=images, latents=noise.double(), guidance_scale=GUIDANCE, height=64, width=64,
            num_inference_steps=EVALUATIONS, output_type="latent", **options,
        ).images  # fmt: skip


def close(a, b, limit=1e-9):
    return (a - b).abs().max() <= limit * b.std()


def test_two_nets_as_diffusers_adds_them_in_any_order(small_base_folder, base, nets, conditions):
    reference = theirs(
        small_base_folder, base, nets, conditions, controlnet_conditioning_scale=[0.8, 1.3],
        control_guidance_start=[0.0, 0.3], control_guidance_end=[0.5, 1.0],
    )  # fmt: skip
    strengths = Strength(0.8, end=0.5), Strength(1.3, start=0.3)
    found = ours(base, nets, conditions, *strengths)
    assert close(found, reference)
    assert close(ours(base, nets[::-1], conditions[::-1], *strengths[::-1]), reference)
    assert not close(ours(base, nets, conditions, strengths[0]), reference, 0.01)
    assert not close(ours(base, nets, conditions[::-1], *strengths), reference, 0.01)


def test_guess_mode_as_diffusers_has_it(small_base_folder, base, nets, conditions):
    """Control in the conditional half, its weights given as numbers: diffusers' differ by up to 0.6 % from `soft`."""
    reference = theirs(small_base_folder, base, nets[:1], conditions, guess_mode=True)
    connections = len(nets[0].controlnet_down_blocks) + 1
    numbers = tuple(torch.logspace(-1, 0, connections, dtype=torch.float64).tolist())
    assert close(ours(base, nets[:1], conditions, Strength(weighting=numbers, control_on="cond")), reference, 1e-6)
    assert not close(ours(base, nets[:1], conditions, Strength(weighting=numbers)), reference, 0.01)


def test_the_weights_of_stable_diffusion():
    """Thirteen connections at a canvas of 512 pixels (paper section 3.4), and 13 of `soft` near diffusers'."""
    sides = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4
    residuals = [torch.zeros(1, 1, side, side) for side in sides]
    assert weights_of("resolution", residuals) == [1 / 8] * 3 + [1 / 4] * 3 + [1 / 2] * 3 + [1] * 4
    soft = torch.tensor(weights_of("soft", residuals))
    assert soft[-1] == 1 and (soft / torch.logspace(-1, 0, 13) - 1).abs().max() < 0.007
    assert weights_of("uniform", residuals) == [1] * 13
    wide = [torch.zeros(1, 1, h, w) for h, w in ((48, 80), (24, 40), (12, 20))]
    assert weights_of("resolution", wide) == pytest.approx([1 / 4, 1 / 2, 1])


def test_weights_reach_their_connections(base, nets, conditions):
    """Numbers equal to a name's do the same; a weight of zero leaves its connection alone."""
    n = len(nets[0].controlnet_down_blocks) + 1
    residuals = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
    residuals += [torch.zeros(1, 1, 4, 4)] * (n - 3)
    for name in ("uniform", "resolution", "soft"):
        numbers = tuple(weights_of(name, residuals))
        one = Strength(weighting=numbers).apply(ones(n), 2.0)
        assert [float(r.mean()) for r in (*one.down, one.middle)] == pytest.approx([2 * w for w in numbers])
    assert not close(
        ours(base, nets[:1], conditions, Strength(weighting="soft")), ours(base, nets[:1], conditions, Strength()), 0.01
    )


def ones(n):
    return Control([torch.ones(2, 1, 8, 8) for _ in range(n - 1)], torch.ones(2, 1, 4, 4))


def test_a_region_confines_control():
    """Each residual is masked at its own size; a black region is no control and not run."""
    region = np.zeros((64, 64), np.float32)
    region[:, :32] = 1
    masked = Strength(region=region).apply(ones(3), 0.5)
    for residual in (*masked.down, masked.middle):
        middle = residual.shape[-1] // 2
        assert (residual[..., :middle] == 0.5).all() and (residual[..., middle:] == 0).all()
    assert Strength(region=region).at(0, 1) == 1 and Strength(region=np.zeros((64, 64), np.float32)).at(0, 1) == 0


def test_a_white_region_is_no_region(base, nets, conditions):
    white = np.ones((64, 64), np.float32)
    assert close(ours(base, nets[:1], conditions, Strength(region=white)), ours(base, nets[:1], conditions, Strength()))


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 1)), min_size=1, max_size=4, unique_by=lambda pair: pair[1]),
    st.integers(1, 30), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_a_schedule_holds_until_the_next_value_and_inside_its_window(pairs, n, a, b):
    start, end = sorted((a, b))
    pairs = tuple(sorted(pairs, key=lambda pair: pair[1]))
    for i in range(n):
        begun = [value for value, begin in pairs if begin <= i / n]
        expected = begun[-1] if begun and i / n >= start and (i + 1) / n <= end else 0
        assert Strength(pairs, start, end).at(i, n) == expected


@pytest.mark.parametrize("strength, runs", [
    (Strength(((1.0, 0.0), (0.0, 0.3), (0.5, 0.8))), 5), (Strength(((1.0, 0.5),)), 5), (Strength(0.0), 0),
    (Strength(-1.0), 10), (Strength(region=np.zeros((64, 64), np.float32)), 0),
])  # fmt: skip
def test_a_net_runs_only_where_its_scale_is_not_zero(base, nets, conditions, strength, runs):
    counter = Counter(nets[0].conv_in)
    ours(base, nets[:1], conditions, strength)
    counter.hook.remove()
    assert counter.count == runs


def test_control_on_the_conditional_half_runs_on_that_half_alone(base, nets, conditions):
    net, unet = Counter(nets[0].controlnet_mid_block), Counter(base.unet.conv_out)
    ours(base, nets[:1], conditions, Strength(control_on="cond"))
    net.hook.remove(), unet.hook.remove()
    assert set(net.batches) == {2} and set(unet.batches) == {4}


def test_a_negative_scale_leads_away(base, nets, conditions):
    """Residuals change their sign: the mean of +1 and -1 is, to first order, no control."""
    control = Strength(-1.5).apply(ones(3), -1.5)
    assert all((r == -1.5).all() for r in (*control.down, control.middle))


def test_twelve_weights_instead_of_thirteen(nets):
    n = nets[0].connections
    assert n == len(nets[0].controlnet_down_blocks) + 1
    flag = ConditionFlag("a.png")
    with pytest.raises(UsageError, match=f"{n - 1} weights, expected {n}: one for each of the {n - 1} skip") as caught:
        check_weighting(flag, (1.0,) * (n - 1), n)
    assert caught.value.hint == "weighting=" + "/".join("1" * n)
    check_weighting(flag, (1.0,) * n, n), check_weighting(flag, "soft", n)


@pytest.mark.parametrize("strength", [
    Strength(start=0, end=0), Strength(start=0.5, end=0.5), Strength(start=1, end=1), Strength(start=0.4, end=0.6),
    Strength(scale=((1.0, 0.9),)),
])  # fmt: skip
def test_a_window_that_holds_nothing_is_refused(strength):
    with pytest.raises(UsageError, match="acts in none of the 2 evaluations"):
        check_window(ConditionFlag("x", start=strength.start, end=strength.end), strength, 2)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 60))
def test_a_window_holds_nothing_iff_it_never_acts(a, b, evaluations):
    strength = Strength(start=min(a, b), end=max(a, b))
    acts = any(strength.at(i, evaluations) for i in range(evaluations))
    assert strength.acts_in(evaluations) == acts
    assert Strength(scale=0.0, start=min(a, b), end=max(a, b)).acts_in(evaluations)
