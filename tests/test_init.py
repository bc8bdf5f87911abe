"""Sampling that starts from a picture: equal to diffusers' pipeline, in flags, files of jobs, records and replay."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from controlnet.model.control.strength import Strength
from controlnet.model.load import load_base
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.generate import Encoded, Request
from controlnet.model.sampling.loop import ActiveNet, count_evaluations, sample
from controlnet.model.sampling.schedulers import SCHEDULERS, make_scheduler
from controlnet.model.sampling.starts import FromNoise, FromPicture
from controlnet.model.sampling.tiles import Whole
from controlnet.model.work.batch import spread
from controlnet.model.work.jobs import Job
from controlnet.preprocessors.errors import Exit, UsageError
from controlnet.preprocessors.metadata import load
from diffusers import StableDiffusionControlNetImg2ImgPipeline
from helpers import both, pixels
from hypothesis import given
from hypothesis import strategies as st

PROMPT = "a red cube on a blue floor"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_parity_with_diffusers_img2img(small_base_folder, condition, scheduler, monkeypatch):
    """Latents in float64 from two pictures' latents, strength 0.6 of 10 steps, guidance 7.5."""
    import diffusers.pipelines.controlnet.pipeline_controlnet_img2img as module

    base, net, pipeline = both(small_base_folder, StableDiffusionControlNetImg2ImgPipeline, scheduler)
    z0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()  # theirs are rounded to float32
    noise = FromNoise.seeded([5, 6], (4, 8, 8))
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise.noise.double())
    hint = condition_tensor(condition)[None].double()
    with torch.no_grad():
        theirs = pipeline(
            [PROMPT] * 2, image=z0, control_image=hint, strength=0.6, generator=noise.generators, guidance_scale=7.5,
            num_inference_steps=10, controlnet_conditioning_scale=0.8, output_type="latent", height=64, width=64,
        ).images  # fmt: skip
        again = FromNoise.seeded([5, 6], (4, 8, 8))
        start = FromPicture(again.noise.double(), again.generators, z0, 0.6)
        prompt, negative = (base.encode_text([text]).to(torch.float64) for text in (PROMPT, ""))
        controls = [ActiveNet(net, net.prepare(hint), Strength(0.8))]
        own, seen = make_scheduler(base.scheduler, scheduler), []
        ours = sample(base.unet, own, start, prompt.rows(2), negative, controls, 10, 7.5,
                      lambda done, of: seen.append(of))  # fmt: skip
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.std()
    assert set(seen) == {len(seen)} == {count_evaluations(own, 10, 0.6)} and len(seen) < count_evaluations(own, 10)


def test_the_latent_of_a_picture_is_the_mean_of_diffusers_vae(small_base_folder):
    base = load_base(str(small_base_folder / "base"))
    picture = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        theirs = base.vae.encode(x).latent_dist.mean * base.vae.config.scaling_factor
        ours, _ = Encoded().encode_pictures(base, [Request("x", k, init=picture) for k in range(2)], False, Whole())
    assert ours.shape == (2, 4, 8, 6) and torch.allclose(ours[:1], theirs, atol=1e-6)


@given(st.integers(1, 999), st.floats(0.001, 1))
def test_a_strength_either_leaves_something_to_make_or_is_refused(steps, strength):
    try:
        job = Job(init="photo.jpg", prompt="x", steps=steps, strength=strength)
    except UsageError as error:
        assert int(steps * strength) == 0 and "leaves none to make" in str(error)
        (given,) = [float(word) for word in error.hint.replace(",", "").split() if word[0].isdecimal()]
        Job(init="photo.jpg", prompt="x", steps=steps, strength=given)  # what the hint says works
    else:
        assert int(steps * job.strength_or_default) >= 1


@pytest.mark.parametrize("fields, told", [
    ({"strength": 0.5}, "without --init"),
    ({"cond": "@init,detect=canny"}, "--cond @init without --init"),
    ({"init": "a.jpg", "strength": 0}, "above 0 and up to 1"),
    ({"init": "a.jpg", "strength": 1.01}, "above 0 and up to 1"),
    ({"init": "a.jpg", "strength": float("nan")}, "above 0 and up to 1"),
    ({"init": "a.jpg", "strength": "much"}, "expected a number"),
])  # fmt: skip
def test_starts_that_cannot_be(fields, told):
    with pytest.raises(UsageError, match=told) as error:
        Job(**{"prompt": "x"} | fields)
    assert error.value.hint


def test_a_photo_is_where_an_image_starts(run, photos, flags, small_base_folder):
    net = small_base_folder / "net"
    cond = f"@init,detect=canny,net={net}"
    command = ["generate", "--init", "photos/0.png", "--prompt", "a cube", *flags]
    assert run(*command, "-o", "a.png")[0] == 0
    assert run(*command, "--cond", cond, "--strength", "0.4", "-o", "b.png")[0] == 0
    image, text = pixels("a.png")
    record = load(text)
    assert image.shape == (64, 88, 3)  # the photo's aspect, the base's native side
    assert (record["init"], record["strength"]) == ("photos/0.png", 0.6) and len(record["init_sha256"]) == 64
    entry = load(pixels("b.png")[1])["conditions"][0]
    assert entry["path"] == "photos/0.png" and entry["kind"] == "canny"

    # Little strength keeps more of the photo; none of another seed's noise is in the way.
    photo = pixels("photos/0.png")[0]
    off = {}
    for strength in ("0.2", "1"):
        run(*command, "--strength", strength, "--size", "96x72", "-o", f"{strength}.png")
        off[strength] = np.abs(pixels(f"{strength}.png")[0].astype(int) - photo).mean()
    assert off["0.2"] < off["1"]

    # Again from the record, also where the photo has moved beside the image.
    assert run("replay", "a.png")[0] == run("replay", "b.png")[0] == 0
    (photos / "moved").mkdir()
    for name in ("a.png", "photos/0.png"):
        (photos / "moved" / Path(name).name).write_bytes((photos / name).read_bytes())
    (photos / "photos/0.png").unlink()
    assert run("replay", "moved/a.png")[0] == 0
    (photos / "moved/0.png").write_bytes((photos / "photos/1.png").read_bytes())
    code, out, err = run("replay", "moved/a.png")
    assert code == Exit.DIFFERENT and "init_sha256" in out + err


def test_folders_and_jobs(run, photos, flags, small_base_folder):
    cond = f"@init,detect=canny,net={small_base_folder / 'net'}"
    assert run("generate", "--init", "photos/", "--cond", cond, "--prompt", "x", *flags, "-o", "set/")[0] == 0
    assert {p.name for p in (photos / "set").iterdir()} == {f"1-{i}.png" for i in range(3)}
    lines = [{"init": f"photos/{i}.png", "cond": cond, "prompt": "x", "strength": 0.6} for i in range(3)]
    (photos / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("generate", "--jobs", "jobs.jsonl", *flags, "-o", "jobs/")[0] == 0
    for i in range(3):
        assert np.array_equal(pixels(f"set/1-{i}.png")[0], pixels(f"jobs/1-{i}.png")[0])
    assert run("generate", "--init", "photos/1.png", "--cond", cond, "--prompt", "x", *flags, "-o", "one.png")[0] == 0
    assert np.abs(pixels("one.png")[0].astype(int) - pixels("set/1-1.png")[0]).max() <= 1  # alone and in a batch
    assert run("generate", "--init", "nowhere.png", "--prompt", "x", *flags)[0] == Exit.INPUT
    window = [*flags, "--strength", "0.4", "--cond", f"{cond},start=0.9"]  # of the two evaluations that are made
    code, _, err = run("generate", "--init", "photos/1.png", "--prompt", "x", *window, "-o", "w.png")
    assert code == Exit.USAGE and "2 evaluations" in err, err


def test_a_folder_of_starts_goes_with_a_folder_of_maps(photos):
    (photos / "maps").mkdir()
    for i in range(3):
        (photos / f"maps/{i}.canny.png").write_bytes((photos / f"photos/{i}.png").read_bytes())
    jobs = spread(Job("maps/", "x", init="photos/"))
    assert [(job.init, job.cond[0].path) for job in jobs] == [
        (f"photos/{i}.png", f"maps/{i}.canny.png") for i in range(3)
    ]


def test_larger(run, photos, flags, small_base_folder):
    """A second pass from the enlarged image; its conditions are on the larger canvas."""
    cond = f"photos/0.png,detect=canny,net={small_base_folder / 'net'}"
    command = ["generate", "--cond", cond, "--prompt", "a cube", "--size", "96x64", *flags]
    assert run(*command, "-o", "a.png")[0] == 0
    assert run(*command, "--hires", "2x", "-o", "b.png")[0] == 0
    small, (large, text) = pixels("a.png")[0], pixels("b.png")
    record = load(text)
    assert large.shape == (128, 192, 3) and (record["hires"], record["hires_strength"]) == (2.0, 0.5)
    assert run("replay", "b.png")[0] == 0
    assert run(*command, "--hires", "2", "--hires-strength", "0.2", "-o", "c.png")[0] == 0
    near = pixels("c.png")[0].reshape(64, 2, 96, 2, 3).mean((1, 3))
    far = large.reshape(64, 2, 96, 2, 3).mean((1, 3))
    assert np.abs(near - small).mean() < np.abs(far - small).mean()  # less strength, more of the first image

    # A recorded image made again, larger: as if it had been asked for.
    assert run("replay", "a.png", "--hires", "2x", "-o", "d.png")[0] == 0
    assert np.array_equal(pixels("d.png")[0], large)
    assert run("replay", "a.png", "--hires", "2x")[0] == Exit.USAGE


@pytest.mark.parametrize("fields, told", [
    ({"hires": "1x"}, "a factor above 1"), ({"hires": 9}, "up to 4"), ({"hires": "big"}, "a factor such as 2x"),
    ({"hires_strength": 0.5}, "without --hires"), ({"hires": 2, "hires_strength": 0}, "above 0 and up to 1"),
    ({"hires": 2, "hires_strength": 0.1, "steps": 5}, "leaves none to make"),
])  # fmt: skip
def test_second_passes_that_cannot_be(fields, told):
    with pytest.raises(UsageError, match=told) as error:
        Job(**{"prompt": "x"} | fields)
    assert error.value.hint


def test_the_picture_as_its_own_condition_is_cut_as_the_start_is(small_base_folder, photos):
    """Not stretched: else map and start would not lie on each other."""
    from controlnet.model.work.studio import Studio
    from controlnet.preprocessors.geometry import fit

    studio = Studio(dtype="float32")
    job = Job(f"@init,kind=tile,net={small_base_folder}/net", "x", base=str(small_base_folder / "base"),
              init="photos/0.png", size="64x128")  # fmt: skip
    _, (condition,) = studio.conditions(job)
    shown, _ = studio.pictures.start("photos/0.png", (64, 128))
    placed = studio.pictures.placed(job.cond[0], condition, (64, 128))
    assert placed.shape == shown.shape and np.abs(placed.astype(int) - shown).mean() < 8
    stretched = fit(studio.pictures.picture("photos/0.png")[0], (64, 128), "stretch")
    assert np.abs(stretched.astype(int) - shown).mean() > 30
