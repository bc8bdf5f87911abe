"""SDXL: two text encoders, pooled text and size in the time embedding; equal to diffusers' pipelines."""

import json

import numpy as np
import pytest
import torch
from controlnet.cli.main import main
from controlnet.model.control.strength import Strength
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.sampling.canvas import canvas_size, condition_tensor
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.model.work.batch import read_jobs
from controlnet.model.work.jobs import make_job
from controlnet.model.work.replay import read_recorded
from controlnet.preprocessors.images import png_bytes
from diffusers import ControlNetModel
from helpers import CANVAS, NEGATIVE, PROMPT, randomise, sdxl_prompts
from transformers import CLIPTextModel


def test_texts_are_diffusers_own(sdxl_folder, sdxl_pipeline):
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    c_t, _, pooled, _ = sdxl_pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, device="cpu")
    ours = base.encode_text([PROMPT])
    assert ours.c_t.shape[-1] == 2048
    assert (ours.c_t - c_t).abs().max() <= 1e-9 * c_t.std() and (ours.pooled - pooled).abs().max() <= 1e-9
    c_t, _, pooled, _ = sdxl_pipeline.encode_prompt(
        PROMPT, prompt_2=NEGATIVE, clip_skip=1, do_classifier_free_guidance=False, device="cpu"
    )
    other = base.encode_text([PROMPT], [NEGATIVE], 1)
    assert (other.c_t - c_t).abs().max() <= 1e-9 * c_t.std() and (other.pooled - pooled).abs().max() <= 1e-9
    assert (other.c_t - ours.c_t).std() > 0.01 * c_t.std() and (other.pooled - ours.pooled).std() > 0
    assert base.cut_words("cube " * 60).startswith("cube") and not base.cut_words("cube")


@pytest.mark.parametrize("scheduler", [None, "ddim", "dpm++2m"])
@pytest.mark.parametrize("control_on", ["both", "cond"])
def test_parity_with_diffusers_pipeline(sdxl_folder, sdxl_pipeline, scheduler, control_on):
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    net = load_controlnet(sdxl_folder / "net", torch.float64, base.unet.config, base.name)
    condition = np.repeat((np.random.default_rng(0).random((*CANVAS[::-1], 1)) < 0.1).astype(np.uint8) * 255, 3, 2)
    hint = condition_tensor(condition)[None].double()
    sdxl_pipeline.scheduler = make_scheduler(base.scheduler, scheduler)
    start = FromNoise.seeded([5, 6], (4, CANVAS[1] // 8, CANVAS[0] // 8))
    start.noise = start.noise.double()
    prompt, negative = sdxl_prompts(base)
    with torch.no_grad():
        theirs = sdxl_pipeline(
            [PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, image=hint, latents=start.noise, guidance_scale=5.0,
            num_inference_steps=5, output_type="latent", width=CANVAS[0], height=CANVAS[1],
            controlnet_conditioning_scale=0.8, guess_mode=control_on == "cond",
        ).images  # fmt: skip
        # diffusers' guess mode has weights of its own, from 0.1 to 1.
        weighting = tuple(np.logspace(-1, 0, net.connections)) if control_on == "cond" else "uniform"

        def ours(scale):
            acting = [ActiveNet(net, net.prepare(hint), Strength(scale, weighting=weighting, control_on=control_on))]
            own = make_scheduler(base.scheduler, scheduler)
            return sample(base.unet, own, start, prompt, negative, acting, 5, 5.0)

        images, without = ours(0.8), ours(0.0)
    assert (images - without).std() > 0.001 * images.std()  # control is at work
    assert (images - theirs).abs().max() <= (
        1e-9 if control_on == "both" else 1e-6
    ) * theirs.std()  # its weights are float32


@pytest.mark.parametrize("form", [
    {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": 1},
    {"transformer_layers_per_block": (0, 0, 1)},
], ids=["small", "mid"])  # fmt: skip
def test_small_nets_are_diffusers_own(sdxl_folder, tmp_path, form):
    """As diffusers publishes them: less attention in the copy than in the base, or none."""
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    whole = ControlNetModel.from_pretrained(sdxl_folder / "net").config
    config = {k: v for k, v in dict(whole).items() if not k.startswith("_")} | form
    torch.manual_seed(0)
    reference = randomise(ControlNetModel(**config)).double().eval()
    reference.save_pretrained(tmp_path)
    net = load_controlnet(tmp_path, torch.float64, base.unet.config, base.name)
    prompt, negative = sdxl_prompts(base)
    z, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([700, 700])
    condition = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    both = type(prompt).cat([negative, prompt])
    with torch.no_grad():
        added = {"text_embeds": both.pooled, "time_ids": both.ids}
        down, middle = reference(
            torch.cat([z, z]), torch.cat([t, t]), both.c_t, condition.expand(4, -1, -1, -1), added_cond_kwargs=added,
            return_dict=False,
        )  # fmt: skip
        ours = net.control(z, net.begin(t[:1], z.dtype), both, net.prepare(condition))
    for a, b in zip([*ours.down, ours.middle], [*down, middle], strict=True):
        a = a.repeat(len(b) // len(a), 1, 1, 1)  # conv_in's is shared by both halves
        assert (a - b).abs().max() <= 1e-9 * b.std()


def test_a_vae_that_says_so_is_in_float32(sdxl_folder, small_base_folder):
    """SDXL's own; Stable Diffusion 1.5's says it too, as any VAE of diffusers does, and needs it not."""
    assert load_base(str(sdxl_folder / "base"), dtype=torch.float16).vae.dtype == torch.float32
    assert load_base(str(sdxl_folder / "base"), dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert load_base(str(small_base_folder / "base"), dtype=torch.float16).vae.dtype == torch.float16


def test_a_vae_that_leaves_float16_goes_on_in_float32(small_base_folder):
    """For that image: no black picture, no NaN, and the next one is as if it had not been."""
    base = load_base(str(small_base_folder / "base"), dtype=torch.float16)
    base.vae.decoder.conv_in.weight.data *= 3e4
    before = {name: value.clone() for name, value in base.vae.state_dict().items()}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():  # as in sampling, where weights of upsampling are folded once
        images = base.decode(latents)
    assert torch.isfinite(images).all() and images.std() > 0.01 and base.vae.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in base.vae.state_dict().items())


@pytest.mark.parametrize("shown, expected", [
    (None, (1024, 1024)), ((768, 512), (1216, 832)), ((512, 768), (832, 1216)), ((500, 480), (1024, 1024)),
    ((3000, 1000), (1536, 640)),
])  # fmt: skip
def test_canvases_are_those_that_it_was_trained_on(sdxl_folder, shown, expected):
    base = load_base(str(sdxl_folder / "base"))
    small = canvas_size(base, shown)  # its native size is 64, not 1024
    assert all(abs(a - b / 16) <= 4 and a % 8 == 0 for a, b in zip(small, expected, strict=True))
    base.unet.register_to_config(sample_size=128)
    assert canvas_size(base, shown) == expected


def test_from_the_command_line_and_again(sdxl_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    (tmp_path / "map.canny.png").write_bytes(png_bytes(lines))
    args = ["--base", str(sdxl_folder / "base"), "--dtype", "float32", "--steps", "2", "--seed", "1", "--size", "64"]
    for out, more in (("a.png", ["--cond", f"map.canny.png,net={sdxl_folder / 'net'}"]), ("b.png", [])):
        with pytest.raises(SystemExit) as stop:
            main(["generate", *args, *more, "-p", PROMPT, "-o", out])
        assert stop.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["generate", *args, "-p", PROMPT, "--prompt2", NEGATIVE, "--clip-skip", "1", "-o", "c.png"])
    assert stop.value.code == 0 and (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    for flags, said in (
        (["--clip-skip", "2"], "has 2 layers"),
        (["--base", "tiny", "--prompt2", "x"], "one text encoder"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", *args, "-p", PROMPT, "-o", "d.png", *flags])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["replay", "c.png"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_it_is_trained_on(sdxl_folder, tmp_path, monkeypatch, capsys):
    """Pooled text and ids from the cache; the network is diffusers' afterwards."""

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        (tmp_path / f"photos/{i}.png").write_bytes(png_bytes(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)))
        (tmp_path / f"photos/{i}.txt").write_text(f"cube {i}")
    sets = ["size=64", "max_steps=4", "batch_size=2", "held_out=2", "log_every=1", "validate_every=2", "pictures=1",
            "gradient_checkpointing=true", "learning_rate=1e-3"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                "photos",
                "--base",
                str(sdxl_folder / "base"),
                "-o",
                "run",
                "-q",
                *(w for s in sets for w in ("--set", s)),
            ]
        )
    assert stop.value.code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4]
    trained = ControlNetModel.from_pretrained(tmp_path / "run")
    assert trained.config.addition_embed_type == "text_time" and trained.add_embedding is not None


def test_clip_skip_is_an_encoder_with_fewer_layers(small_base_folder):
    """Of Stable Diffusion, whose final norm is read all the same."""
    base = load_base(str(small_base_folder / "base"), dtype=torch.float64)
    network = base.text_encoder
    config = type(network.config).from_dict(network.config.to_dict() | {"num_hidden_layers": 1})
    shorter = CLIPTextModel(config).double().eval()
    state = network.state_dict()
    shorter.load_state_dict({name: state[name] for name in shorter.state_dict()})
    whole, skipped = (base.encode_text([PROMPT], None, skip).c_t for skip in (0, 1))
    tokens = base.tokenizer([PROMPT], padding="max_length", max_length=base.max_tokens, return_tensors="pt").input_ids
    assert (skipped - shorter(tokens).last_hidden_state).abs().max() <= 1e-12 * skipped.std()
    assert (whole - skipped).std() > 0.01 * whole.std()


@pytest.mark.parametrize("negative", [None, ""])
def test_no_negative_prompt_is_zeros_and_an_empty_one_is_encoded(sdxl_folder, sdxl_pipeline, negative):
    """As diffusers' pipeline has it for SDXL, whose unconditional half was trained with zeros."""
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    assert base.zeros_for_none and not load_base("tiny").zeros_for_none
    _, c_t, _, pooled = sdxl_pipeline.encode_prompt(PROMPT, negative_prompt=negative, device="cpu")
    ours = base.encode_text([PROMPT, negative])
    assert (ours.c_t[1] - c_t[0]).abs().max() <= 1e-9 and (ours.pooled[1] - pooled[0]).abs().max() <= 1e-9
    assert bool(ours.c_t[1].any()) == (negative == "") and ours.c_t[0].any() and ours.pooled[0].any()


def test_the_record_says_which_negative_prompt_it_was(sdxl_folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    args = ["generate", "--base", sdxl_folder / "base", "--dtype", "float32", "--steps", 2, "--seed", 1, "-p", PROMPT]
    for out, more in (("none.png", []), ("empty.png", ["--negative", ""])):
        assert run(*args, *more, "-o", out)[0] == 0
        assert run("replay", out)[0] == 0
    records = [read_recorded(tmp_path / name).record["negative"] for name in ("none.png", "empty.png")]
    assert records == [None, ""] and (tmp_path / "none.png").read_bytes() != (tmp_path / "empty.png").read_bytes()


def test_sizes_and_crop_that_it_is_told(sdxl_folder, tmp_path, monkeypatch, run):
    base = load_base(str(sdxl_folder / "base"))
    assert base.size_ids((72, 64)).tolist() == [[64, 72, 0, 0, 64, 72]]
    assert base.size_ids((72, 64), (1333, 9), (3, 5), (8, 16)).tolist() == [[9, 1333, 5, 3, 16, 8]]
    monkeypatch.chdir(tmp_path)
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    seen = set()
    for i, more in enumerate(([], ["--original-size", "1333x800"], ["--crop", "30,50"], ["--target-size", "512"])):
        code, _, err = run(*args, *more, "-o", f"{i}.png")
        assert code == 0, err
        seen.add((tmp_path / f"{i}.png").read_bytes())
    assert len(seen) == 4 and run("replay", "2.png")[0] == 0
    assert "--crop: base tiny is not told" in run("generate", "-p", "a", "--crop", "1,2", "-o", "x.png")[2]
    for bad in ("1", "a,b", "-1,2", "1,2,3"):
        assert run(*args, "--crop", bad, "-o", "x.png")[0] == 2


def test_a_size_that_it_was_not_trained_on_is_said(sdxl_folder, tmp_path, run):
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "-o"]
    err = run(*args, tmp_path / "a.png", "--size", "64")[2]
    assert "not trained" not in err
    err = run(*args, tmp_path / "b.png", "--size", "64x128")[2]
    assert "was not trained on 64x128; the nearest is 48x80" in err, err


def test_second_texts(sdxl_folder, tmp_path, monkeypatch, run):
    """An empty one is none, as in diffusers and in CSV files; @FILE is read; what is cut is told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.txt").write_text("a person")
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64, "-o"]
    for name, second in (("a", None), ("b", ""), ("c", "@w.txt"), ("d", "a person")):
        more = [] if second is None else ["--prompt2", second]
        assert run(*args, f"{name}.png", *more)[0] == 0
    a, b, c, d = ((tmp_path / f"{name}.png").read_bytes() for name in "abcd")
    assert a == b and c == d and a != c
    assert run(*args, "x.png", "--prompt2", "@nofile")[0] == 2
    assert "beyond" in run(*args, "e.png", "--prompt2", "cube " * 60, "--plain-prompt")[2]
    code, _, err = run(*args, "x.png", "--negative2", "a person")
    assert code == 2 and "without --negative" in err


def test_none_and_null_in_files_of_jobs():
    defaults = {"negative": "a person", "steps": 7, "base": "tiny"}
    job = make_job({"prompt": "x", "negative": None, "steps": None, "base": None}, defaults)
    assert job.negative is None and job.steps == 20 and job.base == "tiny"
    ((_, given),) = read_jobs("jobs.csv", b"prompt,negative,prompt2\na cube,,\n")
    assert make_job(given, {}).negative is None and make_job(given, {}).prompt2 is None
    assert make_job(given, defaults).negative == "a person"


def test_the_guidance_is_the_familys(sdxl_folder, small_base_folder):
    assert load_base(str(sdxl_folder / "base")).guidance == 5.0
    assert load_base(str(small_base_folder / "base")).guidance == 7.5 and load_base("tiny").guidance == 3.0


def test_a_condition_without_a_score_is_left_out(sdxl_folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    for name in ("a.canny.png", "a.seg.png"):
        (tmp_path / name).write_bytes(png_bytes(lines))
    net = f"net={sdxl_folder / 'net'}"
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    conditions = ["--cond", f"a.canny.png,{net}", "--cond", f"a.seg.png,{net}"]
    assert run(*args, *conditions, "-o", "a.png")[0] == 0
    code, out, err = run("score", "a.png")
    assert code == 0 and "canny" in out and "kind 'seg' has no score" in err
    assert run(*args, *conditions, "-n", 2, "--keep-best", 1, "-o", "best.png")[0] == 0
    assert run(*args, *conditions[2:], "-o", "b.png")[0] == 0 and run("score", "b.png")[0] == 2


@pytest.mark.parametrize("flags", [
    ["--crop", "1,2"], ["--prompt2", "x"], ["--clip-skip", "9"], ["--weighting", "1/1"],
])  # fmt: skip
def test_what_configs_tell_is_told_before_weights_are_read(small_base_folder, tmp_path, monkeypatch, run, flags):
    """Loading a real base takes a while."""
    from controlnet.model.work import models

    def load(*args):
        raise AssertionError("the base is loaded")

    monkeypatch.setattr(models, "load_base", load)
    (tmp_path / "a.canny.png").write_bytes(png_bytes(np.zeros((64, 64), np.uint8)))
    cond = f"{tmp_path / 'a.canny.png'},net={small_base_folder / 'net'}"
    args = ["generate", "--base", small_base_folder / "base", "--cond", cond, "-p", "x", "-o", tmp_path / "x.png"]
    assert run(*args, *flags)[0] == 2
