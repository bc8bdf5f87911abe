"""SDXL on disk: bases, nets and VAEs in every layout, exact both ways; what is not one of ours is refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.files import names
from controlnet.model.files.convert import convert
from controlnet.model.files.families import SDXL
from controlnet.model.files.layouts import open_model
from controlnet.model.load import load_base, with_vae
from controlnet.model.nets import load_controlnet
from controlnet.model.work.jobs import Job
from controlnet.model.work.replay import read_recorded
from controlnet.model.work.studio import Studio
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.files import whole_path
from controlnet.preprocessors.images import png_bytes
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from helpers import PROMPT
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def test_a_net_of_another_family_is_refused(sdxl_folder, small_base_folder):
    base = load_base(str(small_base_folder / "base"))
    with pytest.raises(ModelError, match="SDXL"):
        load_controlnet(sdxl_folder / "net", base=base.unet.config, base_name="mine")
    base = load_base(str(sdxl_folder / "base"))
    with pytest.raises(ModelError, match="the base is SDXL"):
        load_controlnet(small_base_folder / "net", base=base.unet.config, base_name="mine")


def test_both_ways_and_the_same_image(sdxl_folder, tmp_path):
    """Folder, single file and back: every tensor equal; the names are those of the original layout."""
    convert(sdxl_folder / "base", tmp_path / "xl.safetensors", "original")
    with safe_open(tmp_path / "xl.safetensors", "pt") as file:
        here = set(file.keys())
    for name in ("model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.text_projection",
                 "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
                 "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"):  # fmt: skip
        assert name in here, name
    convert(tmp_path / "xl.safetensors", tmp_path / "again", "diffusers")
    before, after = open_model(sdxl_folder / "base"), open_model(tmp_path / "again")
    assert after.parts == before.parts == ("unet", "vae", "text_encoder", "text_encoder_2")
    for part in before.parts:
        a, b = before.state(part), after.state(part)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "again", add_watermarker=False)


def test_names_at_full_size_are_diffusers_own():
    """SDXL's own sizes, without numbers: UNet, ControlNet and second text encoder."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(dict(SDXL.unet))
        net = ControlNet.from_base(unet)
    state = unet.state_dict()
    ours = names.rename(state, names.reverse(names.unet(SDXL.unet)))
    assert len(ours) == len(state) == 1680
    original = {f"model.diffusion_model.{k}": t for k, t in ours.items()}
    back = theirs.convert_ldm_unet_checkpoint(
        original, SDXL.unet | {"num_class_embeds": None, "class_embed_type": None}
    )
    assert back.keys() == state.keys() and all(back[k] is state[k] for k in state)
    config = SDXL.unet | {"conditioning_embedding_out_channels": list(net.hint_widths)}
    renamed = names.rename(net.state_dict(), names.reverse(names.controlnet(config)))
    assert len(renamed) == len(net.state_dict()) and "label_emb.0.2.bias" in renamed
    assert sum(name.startswith("zero_convs.") for name in renamed) == 18 and net.connections == 10


def copied(folder, place, part, **changes):
    """A copy of the base in which the config of a part says something else."""
    shutil.copytree(folder / "base", place)
    path = place / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return place


def test_what_is_no_base_for_images_from_text_is_refused_by_name(sdxl_folder, tmp_path):
    refiner = copied(sdxl_folder, tmp_path / "refiner", "unet", cross_attention_dim=1280)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(refiner / name)
    index = json.loads((refiner / "model_index.json").read_text())
    (refiner / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(ModelError, match="SDXL's refiner, which is not supported"):
        load_base(str(refiner))
    with pytest.raises(ModelError, match="edits pictures by instructions"):
        load_base(str(copied(sdxl_folder, tmp_path / "edits", "unet", in_channels=8)))
    with pytest.raises(ModelError, match="no folder tokenizer_2"):
        place = copied(sdxl_folder, tmp_path / "no tokenizer", "unet")
        shutil.rmtree(place / "tokenizer_2")
        load_base(str(place))
    turbo = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    assert "Turbo" in load_base(str(copied(sdxl_folder, tmp_path / "t", "scheduler", **turbo))).distilled
    assert "lightning" in load_base(str(copied(sdxl_folder, tmp_path / "xl-Lightning", "unet"))).distilled
    assert not load_base(str(sdxl_folder / "base")).distilled


def test_a_base_for_few_steps_is_told(sdxl_folder, tmp_path, run):
    base = copied(sdxl_folder, tmp_path / "xl-turbo", "unet")
    args = ["generate", "--base", base, "-p", PROMPT, "--seed", 1, "-o"]
    assert "seems to be made for few steps" in run(*args, tmp_path / "a.png", "--steps", 13)[2]
    assert "few steps" not in run(*args, tmp_path / "b.png", "--steps", 1, "--guidance", 1)[2]


@pytest.mark.parametrize("name, what", [
    ("lora_controlnet", "a Control-LoRA"),
    ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight", "a ControlNet-LLLite"),
    ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
    ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "a LoRA"),
    ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
])  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, name, what):
    """Also where they hold names of a ControlNet's, as Control-LoRAs do."""
    save_file(
        {name: torch.zeros(2, 2), "input_hint_block.0.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "f.safetensors"
    )
    with pytest.raises(ModelError, match=what):
        open_model(tmp_path / "f.safetensors")


@pytest.fixture(scope="module")
def single(sdxl_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("single") / "xl.safetensors"
    convert(sdxl_folder / "base", place, "original")
    return place


def changed(single, place, change, keep=True):
    """A copy of a single file with its tensors changed; without the configs in its metadata unless `keep`."""
    tensors = load_file(single)
    with safe_open(single, "pt") as file:
        metadata = file.metadata() if keep else {}
    change(tensors)
    save_file(tensors, place, metadata)
    return place


def test_single_files_that_are_not_whole(single, tmp_path):
    """A projection missing, or as a linear layer's weight, which some files have; a table missing; a file cut off."""
    projection, table = (f"conditioner.embedders.1.model.{n}" for n in ("text_projection", "positional_embedding"))

    def pooled(path):
        return load_base(str(path)).encoders[1].network(torch.tensor([[0, 7, 8, 1]])).text_embeds

    def as_layer(tensors):
        tensors[f"{projection}.weight"] = tensors.pop(projection).T.contiguous()

    assert torch.equal(pooled(changed(single, tmp_path / "linear.safetensors", as_layer)), pooled(single))
    for name in (projection, table):
        place = changed(single, tmp_path / "lacks.safetensors", lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ModelError, match="weights lack 1 tensors"):
            load_base(str(place))
    (tmp_path / "cut.safetensors").write_bytes(single.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(tmp_path / "cut.safetensors"))


def test_a_refiner_in_a_single_file(single, tmp_path):
    def refine(tensors):
        for name in [name for name in tensors if "embedders.0" in name]:
            del tensors[name]
        for name in [name for name in tensors if name.endswith("attn2.to_k.weight")]:
            tensors[name] = tensors[name][:, :1280].contiguous()

    with pytest.raises(ModelError, match="SDXL's refiner"):
        load_base(str(changed(single, tmp_path / "refiner.safetensors", refine, keep=False)))


def test_nets_of_another_form_or_type(sdxl_folder, tmp_path):
    """Twelve skips as Stable Diffusion has; weights in float8, which are cast."""
    base = load_base(str(sdxl_folder / "base"))
    shutil.copytree(sdxl_folder / "net", tmp_path / "net")
    weights = tmp_path / "net/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}, weights)
    net = load_controlnet(tmp_path / "net", base.dtype, base.unet.config, base.name)
    assert net.add_embedding.linear_1.weight.dtype == torch.float32
    with pytest.raises(ModelError, match="layers_per_block is 3"):
        config = json.loads((tmp_path / "net/config.json").read_text()) | {"layers_per_block": 3}
        (tmp_path / "net/config.json").write_text(json.dumps(config))
        load_controlnet(tmp_path / "net", base.dtype, base.unet.config, base.name)
    extra = {f"controlnet_down_blocks.{i}.{n}": torch.zeros(16, *[16, 1, 1][: 4 if n == "weight" else 0])
             for i in (9, 10, 11) for n in ("weight", "bias")}  # fmt: skip
    save_file(state | extra, weights)
    (tmp_path / "net/config.json").write_bytes((sdxl_folder / "net/config.json").read_bytes())
    with pytest.raises(ModelError, match="6 unexpected tensors"):
        load_controlnet(tmp_path / "net", base.dtype, base.unet.config, base.name)


def test_another_vae(sdxl_folder, single, small_base_folder, tmp_path, monkeypatch, run):
    """As a folder, and as a file under both layouts' names: the same picture; one of another family is refused."""
    vae = AutoencoderKL.from_pretrained(sdxl_folder / "base/vae")
    torch.manual_seed(0)
    for parameter in vae.decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    vae.save_pretrained(tmp_path / "vae")
    tensors = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "diffusers.safetensors")
    table = names.reverse(names.vae(vae.config))
    original = names.convolution_attention(names.rename(tensors, table))
    save_file({k: t.contiguous() for k, t in original.items()}, tmp_path / "original.safetensors")
    save_file({f"first_stage_model.{k}": t.contiguous() for k, t in original.items()}, tmp_path / "in base.safetensors")
    monkeypatch.chdir(tmp_path)
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    assert run(*args, "-o", "own.png")[0] == 0
    made = []
    for i, place in enumerate(("vae", "diffusers.safetensors", "original.safetensors", "in base.safetensors")):
        code, _, err = run(*args, "--vae", place, "-o", f"{i}.png")
        assert code == 0, err
        made.append(read_recorded(tmp_path / f"{i}.png"))
    assert all(np.array_equal(one.pixels, made[0].pixels) for one in made)
    assert not np.array_equal(made[0].pixels, read_recorded(tmp_path / "own.png").pixels)
    assert made[1].record["vae"] == "diffusers.safetensors" and len(made[1].record["vae_sha256"]) == 64
    assert run("replay", "1.png")[0] == 0
    code, _, err = run(*args, "--vae", small_base_folder / "base/vae", "-o", "x.png")
    assert code == 5 and "SD 1.x or SD 2.x, scaling_factor 0.18215" in err, err
    assert (
        "holds no VAE" in run(*args, "--vae", sdxl_folder / "net/diffusion_pytorch_model.safetensors", "-o", "x.png")[2]
    )
    assert "no such folder or file" in run(*args, "--vae", "nowhere.safetensors", "-o", "x.png")[2]


def test_a_net_in_a_single_file_makes_the_same_image(sdxl_folder, tmp_path, monkeypatch, run):
    """In the original layout with its prefix, label_emb and all."""
    monkeypatch.chdir(tmp_path)
    assert run("models", "convert", sdxl_folder / "net", "net.safetensors", "--to", "original")[0] == 0
    with safe_open("net.safetensors", "pt") as file:
        assert "control_model.label_emb.0.2.weight" in file.keys()  # noqa: SIM118 (not a mapping)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    (tmp_path / "map.canny.png").write_bytes(png_bytes(lines))
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 2, "--seed", 1, "-p", PROMPT, "--size", 64]
    for out, net in (("a.png", sdxl_folder / "net"), ("b.png", "net.safetensors")):
        code, _, err = run(*args, "--cond", f"map.canny.png,net={net}", "-o", out)
        assert code == 0, err
    assert np.array_equal(*(read_recorded(tmp_path / name).pixels for name in ("a.png", "b.png")))


def test_a_vae_of_another_familys_base_is_refused(sdxl_folder, small_base_folder, single, tmp_path, run):
    """In a whole base its family is known; of a folder with a whole base, `vae` is taken."""
    other = tmp_path / "sd.safetensors"
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 4, 3, 3),
               "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 768),
               "first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
               "first_stage_model.decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}  # fmt: skip
    save_file(tensors, other)
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    for place, said in (
        (other, "a VAE of SD 1.x"),
        (small_base_folder / "base", "a VAE of SD 1.x or SD 2.x"),
        (sdxl_folder / "net", "a ControlNetModel, expected a VAE"),
    ):
        code, _, err = run(*args, "--vae", place, "-o", tmp_path / "x.png")
        assert code == 5 and said in err, err
    code, _, err = run(*args, "--vae", single, "-o", tmp_path / "a.png")
    assert code == 0 and run(*args, "--vae", sdxl_folder / "base", "-o", tmp_path / "b.png")[0] == 0, err
    pixels = [read_recorded(tmp_path / name).pixels for name in ("a.png", "b.png")]
    assert np.array_equal(*pixels)


def test_a_tiny_vae(sdxl_folder, tmp_path, run):
    """It reads latents as the UNet has them, for every family."""
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    code, _, err = run(*args, "--vae", tmp_path / "taesd", "-o", tmp_path / "a.png")
    assert code == 0, err


def test_a_base_without_a_vae_takes_another(sdxl_folder, tmp_path):
    """Its own networks are loaded once, however many VAEs there are."""
    base = load_base(str(sdxl_folder / "base"))
    other = with_vae(base, str(sdxl_folder / "base/vae"))
    assert other.unet is base.unet and other.encoders is base.encoders and other.vae is not base.vae
    assert other.vae_path == sdxl_folder / "base/vae"
    studio = Studio(dtype="float32")
    names = [None, str(sdxl_folder / "base/vae"), f"{sdxl_folder}/net/../base/vae"]
    jobs = [Job((), PROMPT, base=str(sdxl_folder / "base"), vae=name) for name in names]
    bases = [studio.base_for(job)[0] for job in jobs]
    assert bases[0].unet is bases[1].unet and bases[1] is bases[2]


def test_a_file_without_a_vae(single, sdxl_folder, tmp_path):
    def without(tensors):
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    place = changed(single, tmp_path / "no vae.safetensors", without)
    with pytest.raises(ModelError, match="holds no VAE") as caught:
        load_base(str(place))
    assert "--vae FILE" in caught.value.hint
    assert load_base(str(place), vae=str(sdxl_folder / "base/vae")).vae is not None


def test_one_path_spelt_twice_is_one_model(sdxl_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = 255
    (tmp_path / "a.canny.png").write_bytes(png_bytes(lines))
    (tmp_path / "white.png").write_bytes(png_bytes(np.full((64, 64, 3), 255, np.uint8)))
    studio = Studio(dtype="float32")
    assert (
        studio.models.net(str(sdxl_folder / "base"), whole_path(f"{sdxl_folder}/net/"))[0]
        is (studio.models.net(str(sdxl_folder / "base"), whole_path(f"{sdxl_folder}/base/../net"))[0])
    )
    assert whole_path("white.png") == whole_path("./white.png") and whole_path("a/b") == "a/b"


def test_converting_keeps_what_no_negative_prompt_is(sdxl_folder, tmp_path):
    place = tmp_path / "other"
    shutil.copytree(sdxl_folder / "base", place)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    convert(place, tmp_path / "other.safetensors", "original")
    convert(tmp_path / "other.safetensors", tmp_path / "again", "diffusers")
    assert open_model(tmp_path / "other.safetensors").index()["force_zeros_for_empty_prompt"] is False
    assert json.loads((tmp_path / "again/model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


@pytest.mark.parametrize("part, changes, said", [
    ("unet", {"sample_size": [8, 8]}, "sample_size"), ("unet", {"sample_size": None}, "sample_size"),
    ("unet", {"sample_size": 0}, "sample_size"), ("unet", {"addition_time_embed_dim": 16}, "addition_time_embed_dim"),
    ("scheduler", {"timestep_spacing": "foo"}, "scheduler"), ("vae", {"scaling_factor": 0}, "scaling_factor"),
    ("text_encoder_2", {"projection_dim": "x"}, "expected x [+] 6 x 8"),
])  # fmt: skip
def test_configs_that_make_no_base(sdxl_folder, tmp_path, part, changes, said):
    with pytest.raises(ModelError, match=said):
        load_base(str(copied(sdxl_folder, tmp_path / "base", part, **changes)))


def test_tokenizers_that_do_not_fit(sdxl_folder, single, tmp_path):
    place = tmp_path / "base"
    shutil.copytree(sdxl_folder / "base", place)
    path = place / "tokenizer_2/tokenizer_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"model_max_length": 5}))
    with pytest.raises(ModelError, match="as many tokens"):
        load_base(str(place))
    with pytest.raises(ModelError, match="knows 49408 tokens"):  # CLIP's, in the place of the small network's own
        load_base(str(single)).encode_text([PROMPT])


def test_names_that_only_hold_a_word(sdxl_folder, tmp_path):
    for name, distilled in (("turbine_hyperreal", False), ("xl-turbo_v2", True), ("XL Lightning 4step", True)):
        assert bool(load_base(str(copied(sdxl_folder, tmp_path / name, "unet"))).distilled) is distilled


def test_a_recorded_vae_that_moved(sdxl_folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sdxl_folder / "base/vae", tmp_path / "vae")
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    assert run(*args, "--vae", "vae", "-o", "a.png")[0] == 0
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    assert run("replay", "a.png")[0] == 2 and run("replay", "a.png", "--vae", "elsewhere")[0] == 0


def test_offline_names_the_vae_too(run, tmp_path):
    code, _, err = run("generate", "--base", "sdxl", "--vae", "a/vae", "-p", "x", "--offline", "-o", tmp_path / "x.png")
    assert code == 5 and "base sdxl" in err and "VAE a/vae" in err
