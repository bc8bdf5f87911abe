"""Unions: several kinds of condition in one ControlNet, equal to diffusers'; and SDXL's nets in single files."""

import inspect
import json

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from controlnet.model.control.strength import Strength
from controlnet.model.files import names
from controlnet.model.files.describe import described
from controlnet.model.files.families import SDXL
from controlnet.model.files.layouts import LAYOUTS, open_model
from controlnet.model.files.stored import CONFIGS
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.sampling.loop import ActiveNet, passes_of, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.preprocessors.errors import Exit, ModelError
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.kinds import union_kinds
from diffusers import ControlNetModel, ControlNetUnionModel, StableDiffusionXLControlNetUnionPipeline
from helpers import CANVAS, NEGATIVE, PROMPT, randomise, sdxl_prompts
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module", params=[6, 8])
def union(request, sdxl_folder, tmp_path_factory):
    """diffusers' network with random weights, and its folder."""
    whole = dict(ControlNetModel.from_pretrained(sdxl_folder / "net").config)
    left_out = ("mid_block_type", "copy", "hint_encoder")
    config = {k: v for k, v in whole.items() if not k.startswith("_") and k not in left_out}
    torch.manual_seed(request.param)
    network = ControlNetUnionModel(
        **config, num_control_type=request.param, num_trans_channel=8, num_proj_channel=8, num_trans_head=2
    )
    place = tmp_path_factory.mktemp("union") / "net"
    randomise(network).double().eval().save_pretrained(place)
    return network, place


@pytest.mark.parametrize("types, scales", [([5], [0.7]), ([3, 0], [0.5, 1.3]), ([3, 3], [1.0, 0.5])])
def test_a_union_is_diffusers_own(sdxl_folder, union, types, scales):
    """One and two conditions in one pass, of two types or of one; several images, as if each were made alone."""
    reference, place = union
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    net = load_controlnet(place, torch.float64, base.unet.config, base.name)
    prompt, _ = sdxl_prompts(base)
    z, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([700])
    conditions = [torch.rand(2, 3, 64, 64, dtype=torch.float64) for _ in types]
    flags = torch.zeros(1, len(net.task_embedding), dtype=torch.float64)
    flags[:, types] = 1
    with torch.no_grad():
        feature = net.join([net.prepare(condition) for condition in conditions], types, scales)
        ours = net.control(z, net.begin(t, z.dtype), prompt, feature)
        outside = scales[0] if len(types) == 1 else 1.0
        for row in range(2):
            one = slice(row, row + 1)
            down, middle = reference(
                z[one], t, prompt.c_t[one], [condition[one] for condition in conditions], flags, types, scales,
                added_cond_kwargs={"text_embeds": prompt.pooled[one], "time_ids": prompt.ids[one]}, return_dict=False,
            )  # fmt: skip
            for a, b in zip([*ours.down, ours.middle], [*down, middle], strict=True):
                assert (outside * a[one] - b).abs().max() <= 1e-9 * b.std()
    assert net.types == len(net.task_embedding) and union_kinds(net.types)[-1] == {6: "seg", 8: "inpaint"}[net.types]


@pytest.mark.parametrize("types", [[1], [3, 0]])
@pytest.mark.parametrize("scheduler", [None, "unipc"])
def test_parity_with_diffusers_union_pipeline(sdxl_folder, sdxl_pipeline, union, types, scheduler):
    """Its guess mode fails at the types of the second half, so control acts on both here."""
    reference, place = union
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    net = load_controlnet(place, torch.float64, base.unet.config, base.name)
    parts = sdxl_pipeline.components | {"controlnet": reference}
    theirs = StableDiffusionXLControlNetUnionPipeline(**parts, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = make_scheduler(base.scheduler, scheduler)
    hints = [torch.rand(1, 3, CANVAS[1], CANVAS[0], dtype=torch.float64) for _ in types]
    start = FromNoise.seeded([5], (4, CANVAS[1] // 8, CANVAS[0] // 8))
    start.noise = start.noise.double()
    prompt, negative = (text.map(lambda tensor: tensor[:1]) for text in sdxl_prompts(base))
    scales = [0.8, 0.6][: len(types)]
    acting = [
        ActiveNet(net, net.prepare(hint), Strength(scale), type_)
        for hint, scale, type_ in zip(hints, scales, types, strict=True)
    ]
    with torch.no_grad():
        other = theirs(
            PROMPT, negative_prompt=NEGATIVE, control_image=hints, control_mode=types,
            latents=start.noise, guidance_scale=5.0, num_inference_steps=4, output_type="latent", width=CANVAS[0],
            height=CANVAS[1], controlnet_conditioning_scale=scales,
        ).images  # fmt: skip
        own = make_scheduler(base.scheduler, scheduler)
        image = sample(base.unet, own, start, prompt, negative, acting, 4, 5.0)
        without = sample(base.unet, own, start, prompt, negative, [], 4, 5.0)
    assert (image - without).std() > 0.001 * image.std()  # control is at work
    assert (image - other).abs().max() <= 1e-9 * other.std()


def test_a_union_takes_together_what_acts_alike(sdxl_folder, union):
    """Conditions that differ in weighting, region or halves of the guidance get passes of their own."""
    net = load_controlnet(union[1])
    plain = load_controlnet(sdxl_folder / "net")
    region = np.ones((64, 64), np.float32)
    strengths = [Strength(0.5), Strength(2.0, end=0.5), Strength(region=region), Strength(weighting="soft")]
    controls = [ActiveNet(net, torch.zeros(1), how, 3) for how in strengths]
    controls += [ActiveNet(plain, torch.zeros(1)), ActiveNet(plain, torch.zeros(1))]
    assert [len(together) for together in passes_of(controls)] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_a_union_from_the_command_line(sdxl_folder, union, tmp_path, monkeypatch, run, layout):
    """Two conditions of one file: other than each alone, the same again, and a type that it lacks is an error."""
    monkeypatch.chdir(tmp_path)
    net = union[1]
    if layout == "single file":  # with the config of this small network where `models convert` writes it
        net = tmp_path / "union.safetensors"
        config = {"controlnet": json.loads((union[1] / "config.json").read_text())}
        save_file(load_file(union[1] / "diffusion_pytorch_model.safetensors"), net, {CONFIGS: json.dumps(config)})
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    for name in ("map.canny.png", "map.depth.png"):
        (tmp_path / name).write_bytes(png_bytes(lines))
        lines = lines.T + np.uint8(9)
    args = ["generate", "--base", sdxl_folder / "base", "--dtype", "float32", "--steps", 2, "--seed", 1, "-p", PROMPT]
    canny, depth = (["--cond", f"map.{kind}.png,net={net},scale=0.7"] for kind in ("canny", "depth"))
    for out, conditions in (("both", [*canny, *depth]), ("canny", canny), ("depth", depth)):
        code, _, err = run(*args, *conditions, "-o", f"{out}.png", "--size", 64)
        assert code == 0, err
    made = {(tmp_path / f"{out}.png").read_bytes() for out in ("both", "canny", "depth")}
    assert len(made) == 3
    code, out, err = run("replay", "both.png")
    assert code == 0 and "identical" in out, err
    code, _, err = run(*args, "--cond", f"map.canny.png,kind=ip2p,net={net}", "-o", "d.png")
    assert code == Exit.USAGE and "kind 'ip2p' is not one of those" in err and "pose, depth" in err


def test_a_config_that_takes_a_union_for_a_plain_net(union, tmp_path):
    """The weights decide; and a union's config beside weights that are none is refused."""
    config = json.loads((union[1] / "config.json").read_text()) | {"_class_name": "ControlNetModel"}
    del config["num_control_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).write_bytes((union[1] / weights).read_bytes())
    assert load_controlnet(tmp_path).types == load_controlnet(union[1]).types


def test_a_union_is_not_trained(sdxl_folder, union, data, tmp_path, run):
    code, _, err = run(
        "train", data, "--base", sdxl_folder / "base", "-o", tmp_path / "run", "--set", f"start_from={union[1]}",
        "--set", "size=64", "--set", "held_out=2",
    )  # fmt: skip
    assert code == Exit.MODEL and "a union of pose, depth" in err, err


def sparse(path, network, rename=lambda name: name, dtype="F16"):
    """A file of a network's tensors, in float16, with nothing but zeros, which take no room on the disk."""
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[rename(name)] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


SMALL = {
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": 1,
}


@pytest.mark.parametrize("form", [{}, SMALL, {"transformer_layers_per_block": (0, 0, 1)}], ids=["full", "small", "mid"])
def test_single_files_at_full_size_are_recognised(tmp_path, form):
    """In diffusers' names, as sd_control_collection has them: the network that their headers describe."""
    with init_empty_weights():
        network = ControlNetModel(**net_config() | form)
    stored = open_model(sparse(tmp_path / "net.safetensors", network))
    assert stored.family is SDXL and stored.parts == ("controlnet",)
    with init_empty_weights():
        ours = ControlNetModel.from_config(stored.config("controlnet"))
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in network.state_dict().items()}
    assert "SDXL" in described(stored.path)["family"]


@pytest.mark.parametrize("types", [6, 8])
def test_a_single_file_of_a_union_at_full_size_is_recognised(tmp_path, types):
    widths = (48, 96, 192, 384)
    with init_empty_weights():
        network = ControlNetUnionModel(
            **net_config() | {"conditioning_embedding_out_channels": widths, "num_control_type": types}
        )
    stored = open_model(sparse(tmp_path / "union.safetensors", network))
    config = stored.config("controlnet")
    assert config["_class_name"] == "ControlNetUnionModel" and config["num_control_type"] == types
    assert tuple(config["conditioning_embedding_out_channels"]) == widths
    with init_empty_weights():
        ours = ControlNetUnionModel.from_config(config)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in network.state_dict().items()}
    said = described(stored.path)
    assert said["what"] == "ControlNet" and said["kinds"][:2] == ["pose", "depth"]
    with pytest.raises(ModelError, match="no place"):
        LAYOUTS["original"].write(stored, tmp_path / "other.safetensors")


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_the_original_layout_at_full_size_is_recognised(tmp_path, prefix):
    """With and without prefix, label_emb kept."""
    with init_empty_weights():
        network = ControlNetModel(**net_config())
    config = SDXL.unet | {"conditioning_embedding_out_channels": [16, 32, 96, 256]}
    table = names.reverse(names.controlnet(config))
    state = names.rename({name: name for name in network.state_dict()}, table)
    other = {before: prefix + after for after, before in state.items()}
    stored = open_model(sparse(tmp_path / "net.safetensors", network, other.get))
    assert stored.family is SDXL
    with init_empty_weights():
        ours = ControlNetModel.from_config(stored.config("controlnet"))
    assert set(names.rename({k.removeprefix(prefix): k for k in other.values()}, names.reverse(table))) == set(
        ours.state_dict()
    )


def net_config():
    keys = inspect.signature(ControlNetModel.__init__).parameters
    return {key: value for key, value in SDXL.unet.items() if key in keys} | {
        "conditioning_embedding_out_channels": (16, 32, 96, 256)
    }
