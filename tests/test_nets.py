"""Networks beside the plain ControlNet, and bases made for inpainting: each equals diffusers' pipeline of it."""

import json
import shutil

import numpy as np
import pytest
import torch
from controlnet.model.control.control import Control
from controlnet.model.control.strength import Strength
from controlnet.model.files.describe import described
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet, load_net
from controlnet.model.registry import BASES, NETS, net_for
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import ForInpainting, FromNoise
from controlnet.preprocessors.errors import Exit, ModelError
from controlnet.preprocessors.images import read_image
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from helpers import NEGATIVE, PROMPT, small_unet
from PIL import Image

RNG = np.random.default_rng(3)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float64)


@pytest.fixture(scope="module")
def inpainting_folder(small_base_folder, tmp_path_factory):
    """The small base with a UNet of 9 input channels."""
    folder = tmp_path_factory.mktemp("inpainting") / "base"
    shutil.copytree(small_base_folder / "base", folder)
    torch.manual_seed(4)
    config = json.loads((folder / "unet/config.json").read_text())
    unet = UNet2DConditionModel.from_config(config | {"in_channels": 9})
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_parity_with_diffusers_on_an_inpainting_base(
    inpainting_folder,
    small_base_folder,
    condition,
    strength,
    monkeypatch,
):
    """Latents in float64 with a ControlNet, a mask of whole latent cells, 10 steps."""
    import diffusers.pipelines.controlnet.pipeline_controlnet_inpaint as module

    base = load_base(str(inpainting_folder), dtype=torch.float64)
    net = load_controlnet(small_base_folder / "net", torch.float64, base.unet.config)
    theirs = ControlNetModel.from_pretrained(small_base_folder / "net").double()
    pipeline = quiet(
        StableDiffusionControlNetInpaintPipeline.from_pretrained(
            inpainting_folder, controlnet=theirs, safety_checker=None
        )
    )
    picture, mask = RNG.integers(0, 255, (64, 64, 3), np.uint8), np.zeros((64, 64), bool)
    mask[16:40, 8:48] = True
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: FromNoise.seeded([5], (4, 8, 8)).noise.double())
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, generator=None: encoded.latent_dist.mean)
    hint = condition_tensor(condition)[None].double()
    with torch.no_grad():
        made = pipeline(
            PROMPT, negative_prompt=NEGATIVE, image=condition_tensor(picture)[None], control_image=hint,
            mask_image=torch.from_numpy(mask)[None, None].float(), strength=strength, guidance_scale=7.5, height=64,
            width=64, num_inference_steps=10, controlnet_conditioning_scale=0.8, output_type="latent",
        ).images  # fmt: skip
        noise = FromNoise.seeded([5], (4, 8, 8))
        cells = torch.from_numpy(mask[::8, ::8]).double()[None, None]
        z0, shown = (base.latent_of(picture, hidden).double() for hidden in (None, mask))
        start = ForInpainting(noise.noise.double(), noise.generators, z0, strength, cells, shown)
        prompt, negative = (base.encode_text([text]).to(torch.float64) for text in (PROMPT, NEGATIVE))
        controls = [ActiveNet(net, net.prepare(hint), Strength(0.8))]
        ours = sample(base.unet, make_scheduler(base.scheduler), start, prompt, negative, controls, 10, 7.5)
    assert (ours - made).abs().max() <= 1e-5 * made.std()  # the picture is float32 on their way to the VAE


def write(path, array):
    Image.fromarray(array).save(path)
    return path


def test_an_inpainting_base_from_the_command_line(run, inpainting_folder, small_base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = RNG.integers(0, 255, (72, 96, 3), np.uint8)
    mask = np.zeros((72, 96), np.uint8)
    mask[20:50, 30:70] = 255
    write("photo.png", photo), write("mask.png", mask), write("x.canny.png", mask)
    common = ["generate", "--base", inpainting_folder, "--steps", 2, "--seed", 1, "-p", "x"]
    for more in ((), ("--cond", f"x.canny.png,net={small_base_folder}/net"), ("--hires", "1.5x")):
        code, _, err = run(*common, "--init", "photo.png", "--mask", "mask.png", *more, "-o", "out.png", "--overwrite")
        assert code == 0, err
        made = read_image((tmp_path / "out.png").read_bytes(), "out.png")[0]
        assert np.array_equal(made[mask == 0], photo[mask == 0]) and (made != photo)[mask > 0].mean() > 0.5
        assert run("replay", "out.png")[1].strip() == "identical"
    code, _, err = run(*common)
    assert code == Exit.USAGE and "made for inpainting: no --mask" in err and "--init photo.jpg --mask" in err
    write("photo2.png", photo)
    code, _, err = run("train", ".", "--base", inpainting_folder, "--kind", "canny", "--set", "max_steps=1")
    assert code == Exit.MODEL and "made for inpainting" in err, err


def hidden_half(width=64, height=64):
    """A picture (H, W, 4) whose left half is transparent."""
    rgba = RNG.integers(0, 255, (height, width, 4), np.uint8)
    rgba[..., 3] = np.where(np.arange(width) < width // 2, 0, 255)
    return rgba


def test_an_inpaint_condition_hides_as_its_network_was_trained(small_base_folder, sdxl_folder, tmp_path):
    """-1 for Stable Diffusion 1.5's, as make_inpaint_condition in diffusers' documentation has it."""
    net = load_controlnet(small_base_folder / "net")
    rgba = hidden_half()
    shown = rgba[..., :3].astype(np.float32) / 255
    shown[rgba[..., 3] < 128] = -1.0
    expected = torch.from_numpy(shown).permute(2, 0, 1)[None]
    with torch.no_grad():
        assert torch.equal(net.prepare(condition_tensor(rgba)[None]), net.controlnet_cond_embedding(expected))
        assert not torch.equal(
            net.prepare(condition_tensor(rgba)[None]), net.prepare(condition_tensor(rgba[..., :3])[None])
        )


def test_inpaint_conditions_from_masks_and_transparency(run, small_base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rgba = hidden_half(96, 72)
    write("hole.png", rgba), write("photo.png", rgba[..., :3]), write("mask.png", 255 - rgba[..., 3])
    common = ["generate", "--base", small_base_folder / "base", "--steps", 2, "--seed", 1, "-p", "x", "--json"]
    net = f"net={small_base_folder}/net"
    painted = ["--init", "photo.png", "--mask", "mask.png"]
    sums = []
    for more in (
        ("--cond", f"hole.png,kind=inpaint,{net}", "--size", "88x64"),
        (*painted, "--cond", f"@init,kind=inpaint,{net}"),
        (*painted, "--cond", f"@init,kind=tile,{net}"),
    ):
        code, out, err = run(*common, *more, "-o", f"{len(sums)}.png")
        assert code == 0, err
        sums.append(json.loads(out)["conditions"][0]["map_sha256"])
        assert run("replay", f"{len(sums) - 1}.png")[1].strip() == "identical"
    assert len(set(sums)) == 3
    write("wide.png", np.pad(rgba, ((0, 0), (24, 24), (0, 0)), mode="edge"))
    square = [*common, "--init", "wide.png", "--size", "64x64", "--strength", "0.5"]  # it shows the middle of both
    for cond, name in (
        (f"@init,kind=inpaint,{net}", "cut.png"),
        (f"wide.png,detect=inpaint,kind=inpaint,{net}", "d.png"),
    ):
        code, out, err = run(*square, "--cond", cond, "-o", name)
        assert code == 0, err
    code, _, err = run(*common, "--cond", f"photo.png,kind=inpaint,{net}")
    assert code == Exit.INPUT and "hides nothing" in err


@pytest.fixture(scope="module")
def shuffle_folder(small_base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shuffle") / "net"
    shutil.copytree(small_base_folder / "net", folder)
    config = json.loads((folder / "config.json").read_text()) | {"global_pool_conditions": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_shuffle_network_equals_diffusers(small_base_folder, shuffle_folder, condition):
    """Control averaged over the picture, on the half with the prompt alone."""
    base = load_base(str(small_base_folder / "base"), dtype=torch.float64)
    net = load_controlnet(shuffle_folder, torch.float64)
    theirs = ControlNetModel.from_pretrained(shuffle_folder).double()
    pipeline = quiet(
        StableDiffusionControlNetPipeline.from_pretrained(
            small_base_folder / "base", controlnet=theirs, safety_checker=None
        )
    )
    hint = condition_tensor(condition)[None].double()
    start = FromNoise.seeded([5], (4, 8, 8))
    with torch.no_grad():
        made = pipeline(
            PROMPT, image=hint, negative_prompt=NEGATIVE, latents=start.noise.double(), num_inference_steps=5,
            guidance_scale=7.5, controlnet_conditioning_scale=0.9, output_type="latent", height=64, width=64,
        ).images  # fmt: skip
        prompt, negative = (base.encode_text([text]).to(torch.float64) for text in (PROMPT, NEGATIVE))
        start.noise = start.noise.double()
        controls = [ActiveNet(net, net.prepare(hint), Strength(0.9, control_on="cond"))]
        ours = sample(base.unet, make_scheduler(base.scheduler), start, prompt, negative, controls, 5, 7.5)
    assert net.averages and torch.allclose(ours, made, atol=1e-10)


def test_a_shuffle_network_acts_in_its_region_and_by_the_size_of_its_connections(small_base_folder, shuffle_folder):
    """What is averaged is the same everywhere, and has the size that it had."""
    net = load_controlnet(shuffle_folder)
    torch.manual_seed(0)
    control = Control([torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4, 4)], torch.randn(1, 2, 2, 2)).averaged()
    region = np.zeros((64, 64), np.float32)
    region[:, :32] = 1
    acting = Strength(region=region).apply(control, 1.0).down[0]
    assert torch.equal(acting[..., :4], control.down[0][..., :4]) and not acting[..., 4:].any()
    weights = [float(b.mean() / a.mean()) for a, b in zip(
        control.residuals, Strength(weighting="resolution").apply(control, 1.0).residuals, strict=True)]  # fmt: skip
    assert weights == pytest.approx([0.25, 0.5, 1.0]) and net.averages


def test_a_shuffle_network_acts_on_the_half_with_the_prompt(
    run, small_base_folder, shuffle_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write("photo.png", RNG.integers(0, 255, (64, 64, 3), np.uint8))
    common = ["generate", "--base", small_base_folder / "base", "--steps", 3, "--seed", 1, "-p", "x", "--size", 64]
    images = {}
    for name, net, more in (
        ("a", shuffle_folder, ()),
        ("b", shuffle_folder, ("--control-on", "cond")),
        ("c", small_base_folder / "net", ("--control-on", "cond")),
    ):
        assert run(*common, "--cond", f"photo.png,kind=shuffle,net={net}", *more, "-o", f"{name}.png")[0] == 0
        images[name] = read_image((tmp_path / f"{name}.png").read_bytes(), name)[0]
    assert np.array_equal(images["a"], images["b"]) and not np.array_equal(images["a"], images["c"])


def write_t2i(folder, channels, kind, in_channels=3):
    torch.manual_seed(6)
    factor = 16 if kind.endswith("xl") else 8
    T2IAdapter(in_channels, list(channels), 2, factor, kind).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, in_channels", [("full_adapter", 3), ("full_adapter", 1), ("light_adapter", 3)])
def test_a_t2i_adapter_equals_diffusers(small_base_folder, tmp_path, kind, in_channels):
    light, at = kind == "light_adapter", small_base_folder / "base"
    folder = write_t2i(tmp_path / "t2i", (8, 16), kind, in_channels)
    if light:  # its last two features are equally wide
        at = shutil.copytree(at, tmp_path / "base")
        downs, ups = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
        small_unet(
            block_out_channels=(8, 16, 16), down_block_types=(*downs, "DownBlock2D"), up_block_types=("UpBlock2D", *ups)
        ).save_pretrained(at / "unet")
    base = load_base(str(at), dtype=torch.float64)
    pipeline = quiet(
        StableDiffusionAdapterPipeline.from_pretrained(
            at, adapter=T2IAdapter.from_pretrained(folder).double(), safety_checker=None
        )
    )
    net = load_net(folder, torch.float64, base.unet.config)
    hint = torch.rand(1, in_channels, 64, 72, dtype=torch.float64)
    check_t2i(base, net, hint, pipeline, 7.5, (4, 8, 9))


def test_sdxls_t2i_adapter_equals_diffusers(sdxl_folder, tmp_path):
    """Its features have half the latent's size, of which the last is the middle block's."""
    folder = write_t2i(tmp_path / "t2i", (8, 16, 16, 16), "full_adapter_xl")
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    adapter = T2IAdapter.from_pretrained(folder).double()
    pipeline = quiet(
        StableDiffusionXLAdapterPipeline.from_pretrained(sdxl_folder / "base", adapter=adapter, add_watermarker=False)
    )
    net = load_net(folder, torch.float64, base.unet.config)
    check_t2i(base, net, torch.rand(1, 3, 64, 96, dtype=torch.float64), pipeline, 5.0, (4, 8, 12))


def check_t2i(base, net, hint, pipeline, guidance, shape):
    height, width = (8 * side for side in shape[1:])
    start = FromNoise.seeded([5], shape)
    with torch.no_grad():
        made = pipeline(
            PROMPT, image=hint, negative_prompt=NEGATIVE, latents=start.noise.double(), num_inference_steps=5,
            guidance_scale=guidance, adapter_conditioning_scale=0.9, output_type="latent", height=height, width=width,
        ).images  # fmt: skip
        ids = base.size_ids((width, height))
        prompt, negative = (base.encode_text([text]).with_ids(ids).to(torch.float64) for text in (PROMPT, NEGATIVE))
        start.noise = start.noise.double()
        outs = []
        for scale in (0.9, 0.0):
            controls = [ActiveNet(net, net.prepare(hint), Strength(scale))]
            scheduler = make_scheduler(base.scheduler)
            outs.append(sample(base.unet, scheduler, start, prompt, negative, controls, 5, guidance))
    assert torch.allclose(outs[0], made, atol=1e-9) and not torch.allclose(outs[1], made, atol=1e-2)


def test_a_t2i_adapter_beside_a_controlnet_and_with_its_options(
    run, small_base_folder, sdxl_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    t2i = write_t2i(tmp_path / "t2i", (8, 16), "full_adapter")
    write("a.canny.png", (RNG.random((64, 64)) < 0.1).astype(np.uint8) * 255)
    common = ["generate", "--base", small_base_folder / "base", "--steps", 4, "--seed", 1, "-p", "x", "--size", "72x64"]
    images = []
    for k, more in enumerate(("", ",scale=0.5", ",end=0.5", ",weighting=1/0", ",weighting=resolution", ",scale=0")):
        code, _, err = run(*common, "--cond", f"a.canny.png,net={t2i}{more}", "-o", f"{k}.png")
        assert code == 0, err
        images.append(read_image((tmp_path / f"{k}.png").read_bytes(), "x")[0])
        assert run("replay", f"{k}.png")[1].strip() == "identical"
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])
    both = ["--cond", f"a.canny.png,net={t2i}", "--cond", f"a.canny.png,net={small_base_folder}/net", "--num", 3]
    assert run(*common, *both, "-o", "both/", "--control-on", "cond")[0] == 0
    code, _, err = run(*common, "--cond", f"a.canny.png,net={t2i},weighting=1/1/1")
    assert code == 2 and "has 3 weights, expected 2" in err
    code, _, err = run("generate", "--base", sdxl_folder / "base", "--cond", f"a.canny.png,net={t2i}", "-p", "x")
    assert code == Exit.MODEL and "a T2I-Adapter of SD 1.x" in err
    assert described(t2i)["what"] == "T2I-Adapter" and run("models", "show", t2i)[0] == 0
    with pytest.raises(ModelError, match="expected a ControlNet"):
        load_controlnet(t2i)
    code, _, err = run("models", "convert", t2i, "x.safetensors", "--to", "original")
    assert code == Exit.MODEL and "T2I-Adapter" in err and "Traceback" not in err


def test_each_image_of_a_batch_has_its_own_t2i_features(small_base_folder, tmp_path):
    base = load_base(str(small_base_folder / "base"), dtype=torch.float64)
    net = load_net(write_t2i(tmp_path / "t2i", (8, 16), "full_adapter"), torch.float64)
    maps = [RNG.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(2)]
    requests = [Request("x", 1, (one,)) for one in maps]
    together = list(generate(base, requests, [(net, Strength())], (64, 64), 3))
    alone = [next(generate(base, [one], [(net, Strength())], (64, 64), 3)) for one in requests]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(*together)


def test_the_table_has_the_whole_1_1_set():
    kinds = {"canny", "pose", "depth", "normal", "softedge", "scribble", "lineart", "lineart_anime", "mlsd", "seg",
             "tile", "shuffle", "inpaint", "ip2p"}  # fmt: skip
    assert {net.kind for name, net in NETS.items() if name.startswith("sd15") and "t2i" not in name} == kinds
    assert all("t2i" not in net_for(family, "canny").source for family in ("SD 1.x", "SDXL"))
    assert {"sd15-inpainting", "sdxl-inpainting", "sd2-inpainting"} <= BASES.keys()
    assert not BASES.keys() & NETS.keys()  # `models pull NAME` means one of them
