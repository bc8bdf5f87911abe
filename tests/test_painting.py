"""Parts of photos made anew: masks, regions, conditions on what is painted and on the rest."""

import json

import numpy as np
import pytest
import torch
from controlnet.model.control.strength import Strength
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import SCHEDULERS, make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.metadata import load
from helpers import both, ellipse, pixels
from hypothesis import given
from hypothesis import strategies as st

PROMPT = "a red cube on a blue floor"


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_parity_with_diffusers_inpainting(small_base_folder, condition, scheduler, strength, monkeypatch):
    """Latents in float64, a mask of whole latent cells, 10 steps, guidance 7.5."""
    import diffusers.pipelines.controlnet.pipeline_controlnet_inpaint as module
    from controlnet.model.sampling.starts import InMask
    from diffusers import StableDiffusionControlNetInpaintPipeline

    base, net, pipeline = both(small_base_folder, StableDiffusionControlNetInpaintPipeline, scheduler)
    picture = np.random.default_rng(3).integers(0, 255, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:40, 8:48] = True
    noise = FromNoise.seeded([5], (4, 8, 8))
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise.noise.double())
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, generator=None: encoded.latent_dist.mean)
    hint = condition_tensor(condition)[None].double()
    with torch.no_grad():
        theirs = pipeline(
            PROMPT, image=condition_tensor(picture)[None], mask_image=torch.from_numpy(mask)[None, None].float(),
            control_image=hint, strength=strength, generator=noise.generators[0], guidance_scale=7.5,
            num_inference_steps=10, controlnet_conditioning_scale=0.8, output_type="latent", height=64, width=64,
        ).images  # fmt: skip
        again = FromNoise.seeded([5], (4, 8, 8))
        cells = torch.from_numpy(mask[::8, ::8]).double()[None, None]
        z0 = base.latent_of(picture).double()
        start = InMask(again.noise.double(), again.generators, z0, strength, cells)
        prompt, negative = (base.encode_text([text]).to(torch.float64) for text in (PROMPT, ""))
        controls = [ActiveNet(net, net.prepare(hint), Strength(0.8))]
        ours = sample(base.unet, make_scheduler(base.scheduler, scheduler), start, prompt, negative, controls, 10, 7.5)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()  # the picture is float32 on their way to the VAE
    outside = cells.expand_as(ours) == 0
    assert torch.allclose(ours[outside], z0[outside], atol=1e-12) and not torch.allclose(ours, z0, atol=0.1)


@given(st.integers(60, 140), st.integers(60, 140), st.integers(0, 12))
def test_what_is_not_made_anew_stays_byte_for_byte(height, width, feather):
    from controlnet.model.work.paint import Painting, _feathered

    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (height, width, 3), np.uint8)
    anew = ellipse(height, width) > 0
    painting = Painting(photo, _feathered(anew, feather), "")
    canvas, touched = painting.on_canvas((64, 96))
    assert canvas.shape == (96, 64, 3) and touched.shape == (96, 64) and touched.any() and not touched.all()
    result = painting.laid_over(255 - canvas)
    assert np.array_equal(result[~anew], photo[~anew]) and (result[anew] != photo[anew]).any(1).mean() > 0.5


def test_a_part_of_a_photo_is_painted(run, photos, masks, flags, small_base_folder):
    cond = f"@init,detect=canny,net={small_base_folder / 'net'}"
    command = ["generate", "--init", "photos/0.png", "--prompt", "a cube", "--cond", cond, *flags]
    photo = pixels("photos/0.png")[0]
    assert run(*command, "--mask", "mask.png", "-o", "a.png")[0] == 0
    image, text = pixels("a.png")
    assert image.shape == photo.shape and np.array_equal(image[~masks], photo[~masks])
    assert (image[masks] != photo[masks]).any(1).mean() > 0.9
    record = load(text)
    assert (record["mask"], record["strength"]) == ("mask.png", 1.0) and len(record["mask_sha256"]) == 64
    assert run("replay", "a.png")[0] == 0

    # The same mask said in other ways.
    assert run(*command, "--mask", "negative.png", "--invert-mask", "-o", "b.png")[0] == 0
    code, _, err = run(*command, "--mask", "large.png", "-o", "c.png")
    assert code == 0 and "mask of 192x144 brought to the photo's 96x72" in err
    assert np.array_equal(image, pixels("b.png")[0])
    assert run(*command, "--mask", "mask.png", "--feather", "8", "-o", "d.png")[0] == 0
    soft = pixels("d.png")[0]
    assert np.array_equal(soft[~masks], photo[~masks]) and not np.array_equal(soft, image)

    hole = ["generate", "--init", "hole.png", "--mask", "@alpha", "--prompt", "x", *flags, "-o", "e.png"]
    assert run(*hole)[0] == 0
    assert np.array_equal(pixels("e.png")[0][~masks], photo[~masks])


def test_soft_masks_and_transparent_ones(run, photos, masks, flags):
    """Grey is made anew in part; under a transparency are the photo's own colours, no white; a mask may be painted on a
    transparent layer."""
    from PIL import Image

    photo = pixels("photos/0.png")[0]
    Image.fromarray(np.where(masks, 255, 0).astype(np.uint8)).save("hard.png")
    Image.fromarray(np.where(masks, 128, 0).astype(np.uint8)).save("half.png")
    layer = np.dstack([np.full((72, 96, 3), 255, np.uint8), np.where(masks, 255, 0).astype(np.uint8)])
    Image.fromarray(layer).save("layer.png")
    Image.fromarray(np.dstack([photo, np.where(masks, 127, 255).astype(np.uint8)])).save("veil.png")
    made = {}
    for name, init, mask in (("hard", "photos/0.png", "hard.png"), ("half", "photos/0.png", "half.png"),
                             ("layer", "photos/0.png", "layer.png"), ("veil", "veil.png", "@alpha")):  # fmt: skip
        command = ["generate", "--init", init, "--mask", mask, "--prompt", "x", *flags, "-o", f"{name}.out.png"]
        assert run(*command)[0] == 0
        made[name] = pixels(f"{name}.out.png")[0].astype(int)
        assert np.array_equal(made[name][~masks], photo[~masks])
    middle = (made["hard"] + photo) / 2
    assert np.array_equal(made["layer"], made["hard"])
    assert np.abs(made["half"] - middle)[masks].max() <= 2 and np.abs(made["veil"] - middle)[masks].max() <= 2


def test_one_photo_with_a_folder_of_masks(run, photos, masks, flags):
    """Each image is named after both."""
    (photos / "masks").mkdir()
    for name in ("mask", "negative"):
        (photos / f"masks/{name}.png").write_bytes((photos / f"{name}.png").read_bytes())
    command = ["generate", "--init", "photos/0.png", "--mask", "masks/", "--prompt", "x", *flags, "-o", "set/"]
    assert run(*command)[0] == 0
    assert sorted(path.name for path in (photos / "set").iterdir()) == ["1-0-mask.png", "1-0-negative.png"]


def test_replay_is_told_where_pictures_are_now(run, photos, masks, flags, monkeypatch):
    command = ["generate", "--init", "photos/0.png", "--mask", "mask.png", "--prompt", "x", *flags]
    assert run(*command, "-o", "a.png")[0] == 0
    (photos / "else").mkdir()
    monkeypatch.chdir(photos / "else")
    code, _, err = run("replay", "../a.png", "--mask", "../mask.png")
    assert code == Exit.INPUT and "photos/0.png: no such file" in err and "--init FILE" in err
    moved = ["--init", "../photos/0.png", "--mask", "../mask.png"]
    assert run("replay", "../a.png", *moved)[0] == 0
    code, _, err = run("replay", "../a.png", *moved, "-o", "-")
    assert code == Exit.USAGE and "both go to standard output" in err
    assert run("replay", "../a.png", *moved, "--seed", "2", "-o", "again/")[0] == 0
    assert (photos / "else/again/a.png").is_file()
    code, _, err = run("replay", "../a.png", *moved, "--seed", "2", "-o", "again/")
    assert code == Exit.OUTPUT and "--skip-existing" not in err
    monkeypatch.chdir(photos)
    assert run("generate", "--prompt", "x", *flags, "-o", "plain.png")[0] == 0
    assert run("replay", "plain.png", "--init", "photos/0.png")[0] == Exit.USAGE


@pytest.mark.parametrize("flag", ["--init", "--mask", "--base"])
def test_an_empty_name_is_no_name(run, photos, flags, flag):
    """A variable of the shell that was not set must not mean: the whole photo."""
    code, _, err = run("generate", "--init", "photos/0.png", flag, "", "--prompt", "x", *flags[2:], "-o", "x.png")
    assert code == Exit.USAGE and "is empty" in err and not (photos / "x.png").exists()


@pytest.mark.parametrize("more, code, told", [
    (["--mask", "black.png"], Exit.INPUT, "nothing is to be made anew"),
    (["--mask", "white.png"], Exit.INPUT, "all of it is to be made anew"),
    (["--mask", "white.png", "--invert-mask"], Exit.INPUT, "nothing is to be made anew"),
    (["--mask", "@alpha"], Exit.INPUT, "has no transparency"),
    (["--mask", "nowhere.png"], Exit.INPUT, "nowhere.png: no such file"),
    (["--mask", "mask.png", "--size", "128x64"], Exit.USAGE, "expected its aspect"),
    (["--mask", "mask.png", "--feather", "-1"], Exit.USAGE, "0 to 1000"),
    (["--invert-mask"], Exit.USAGE, "no --mask to change"),
])  # fmt: skip
def test_masks_that_cannot_be(run, photos, masks, flags, more, code, told):
    found, _, err = run("generate", "--init", "photos/0.png", "--prompt", "x", *flags, *more, "-o", "x.png")
    assert found == code and told in err and "hint:" in err and not (photos / "x.png").exists(), err
    if "--init" in more or "--mask" in more:
        assert run("generate", "--prompt", "x", *flags, *more, "-o", "x.png")[0] == Exit.USAGE


def test_masks_of_a_folder(run, photos, masks, flags):
    (photos / "masks").mkdir()
    for i in range(3):
        (photos / f"masks/{i}.png").write_bytes((photos / "mask.png").read_bytes())
    assert run("generate", "--init", "photos/", "--mask", "masks/", "--prompt", "x", *flags, "-o", "set/")[0] == 0
    for i in range(3):
        photo = pixels(f"photos/{i}.png")[0]
        assert np.array_equal(pixels(f"set/1-{i}.png")[0][~masks], photo[~masks])


def test_pictures_on_sdxl(run, photos, masks, sdxl_folder):
    """Its canvas for painting has the photo's own aspect, and it is told of it."""
    base = ["--base", sdxl_folder / "base", "--dtype", "float32", "--steps", "3", "--seed", "1", "-q"]
    cond = f"@init,detect=canny,net={sdxl_folder / 'net'}"
    command = ["generate", "--init", "photos/0.png", "--cond", cond, "--prompt", "a cube", "--size", "96x72", *base]
    photo = pixels("photos/0.png")[0]
    assert run(*command, "--strength", "0.7", "-o", "a.png")[0] == 0
    assert run(*command, "--mask", "mask.png", "-o", "b.png")[0] == 0
    image, text = pixels("b.png")
    assert np.array_equal(image[~masks], photo[~masks]) and (image[masks] != photo[masks]).any()
    assert run("replay", "a.png")[0] == run("replay", "b.png")[0] == 0 and load(text)["size"][0] > 0


def test_larger_in_a_mask(run, photos, masks, flags):
    photo = pixels("photos/0.png")[0]
    command = ["generate", "--init", "photos/0.png", "--mask", "mask.png", "--prompt", "x", *flags, "--hires", "1.5x"]
    assert run(*command, "-o", "a.png")[0] == 0
    image = pixels("a.png")[0]
    assert image.shape == photo.shape and np.array_equal(image[~masks], photo[~masks])


def test_a_region_is_made_anew_at_the_bases_own_size(run, photos):
    """A small part of a large photo: its surroundings fill the canvas, and all else stays byte for byte."""
    rng = np.random.default_rng(1)
    photo = np.kron(rng.integers(0, 255, (40, 60, 3), np.uint8), np.ones((8, 8, 1), np.uint8))  # (320, 480)
    mask = np.zeros((320, 480), np.uint8)
    mask[200:230, 300:340] = 255
    (photos / "large.png").write_bytes(png_bytes(photo))
    (photos / "small.png").write_bytes(png_bytes(mask))
    common = ["generate", "--init", "large.png", "--mask", "small.png", "--prompt", "x", "--steps", "2", "--seed", "1"]
    kinds = ["--cond", "@init,detect=canny"]
    for more in ((), kinds, ("--hires", "1.5x"), ("--feather", 6)):
        code, _, err = run(*common, "--region-only", *more, "-o", "region.png", "--overwrite")
        assert code == 0, err
        made, record = pixels("region.png")
        assert load(record)["region_only"] and made.shape == photo.shape
        assert np.array_equal(made[mask == 0], photo[mask == 0])
        assert (made != photo)[mask > 0].mean() > 0.5
        code, out, err = run("replay", "region.png")
        assert out.strip() == "identical", err
    # Its condition is the region's alone, and one from a file is cut as the photo is.
    assert run("detect", "canny", "large.png", "--resize", "keep", "-o", "large.canny.png")[0] == 0
    sums = []
    for cond in ("@init,detect=canny", "large.canny.png"):
        for more in ((), ("--region-only",)):
            code, out, err = run(*common, "--cond", cond, *more, "--json", "-o", f"{len(sums)}.png")
            assert code == 0, err
            sums.append(json.loads(out)["conditions"][0]["map_sha256"])
    assert len(set(sums)) == 4
    code, _, err = run("generate", "--init", "large.png", "--region-only", "--prompt", "x")
    assert code == Exit.USAGE and "no --mask to change" in err


@given(
    st.integers(10, 200), st.integers(10, 200), st.integers(0, 190), st.integers(0, 190), st.integers(1, 60),
    st.integers(1, 60),
)  # fmt: skip
def test_a_region_holds_the_mask_and_lies_in_the_photo(height, width, top, left, tall, wide):
    from controlnet.model.work.paint import Painting, _box_around
    from controlnet.preprocessors.geometry import inside

    painted = np.zeros((height, width), bool)
    painted[top % height : top % height + tall, left % width : left % width + wide] = True
    box = _box_around(painted)
    assert all(0 <= side <= 1 for side in box) and box[0] < box[2] and box[1] < box[3]
    assert inside(painted, box).sum() == painted.sum()
    painting = Painting(np.zeros((height, width, 3), np.uint8), painted.astype(np.float32), "", box)
    made = painting.laid_over(np.full((painting.size[1], painting.size[0], 3), 200, np.uint8))
    assert np.array_equal(made[..., 0] == 200, painted)


def test_a_condition_acts_on_the_rest_or_on_what_is_painted(run, photos, masks):
    """As with a picture of the mask, or of its negative, as region."""
    common = [
        "generate",
        "--init",
        "photos/0.png",
        "--mask",
        "mask.png",
        "--prompt",
        "x",
        "--steps",
        "2",
        "--seed",
        "1",
    ]
    images = {}
    for region in ("@mask", "mask.png", "@rest", "negative.png"):
        code, _, err = run(*common, "--cond", f"@init,detect=canny,region={region}", "-o", "r.png", "--overwrite")
        assert code == 0, err
        images[region] = pixels("r.png")[0]
        assert run("replay", "r.png")[1].strip() == "identical"
    near = {a: float(np.abs(images["@mask"].astype(int) - images[a]).mean()) for a in images}
    assert near["mask.png"] < near["negative.png"] and not np.array_equal(images["@mask"], images["@rest"])
    code, _, err = run("generate", "--cond", "photos/0.png,detect=canny,region=@rest", "--prompt", "x")
    assert code == Exit.USAGE and "region=@rest without --mask" in err


def test_regions_of_two_masks_in_one_batch(run, photos, flags, small_base_folder):
    """With --region-only a region is cut as its photo is: such images are not made under the first one's."""
    rng = np.random.default_rng(1)
    photo = np.kron(rng.integers(0, 255, (40, 60, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    (photos / "large.png").write_bytes(png_bytes(photo))
    (photos / "region.png").write_bytes(png_bytes((np.arange(480) > 300) * np.full((320, 480), 255, np.uint8)))
    for name, left in (("l", 40), ("r", 400)):
        mask = np.zeros((320, 480), np.uint8)
        mask[100:130, left : left + 40] = 255
        (photos / f"{name}.png").write_bytes(png_bytes(mask))
    cond = f"large.png,detect=canny,net={small_base_folder}/net,region=region.png"
    job = {"prompt": "x", "init": "large.png", "region_only": True, "cond": cond, "size": "72x64"}
    jobs = [job | {"mask": f"{name}.png", "out": f"out-{name}.png"} for name in "lr"]
    (photos / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    assert run("generate", *flags, "--jobs", "jobs.jsonl")[0] == 0
    for name in "lr":
        _, out, err = run("replay", f"out-{name}.png")
        assert out.strip() == "identical", (name, err)


def test_a_thin_line_in_a_large_mask_is_not_lost(run, photos, flags):
    mask = np.zeros((720, 960), np.uint8)
    mask[300:303, 100:800] = 255
    (photos / "thin.png").write_bytes(png_bytes(mask))
    code, _, err = run("generate", "--init", "photos/0.png", "--mask", "thin.png", "-p", "x", *flags, "-o", "t.png")
    assert code == 0 and (pixels("t.png")[0] != pixels("photos/0.png")[0]).any(), err
