"""Both layouts: names against diffusers' own converters, round trips, what is read, and what is refused."""

import json
import pickle
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.strength import Strength
from controlnet.model.files import names
from controlnet.model.files.convert import convert
from controlnet.model.files.families import SD1, SD2, VAE, scheduler_config
from controlnet.model.files.layouts import open_model
from controlnet.model.files.single import to_open_clip
from controlnet.model.files.stored import STEMS
from controlnet.model.files.tensors import read_tensors, write_tensors
from controlnet.model.files.tokenizer import MERGES, clip_vocabulary, write_tokenizer
from controlnet.model.load import find_base, load_base
from controlnet.model.nets import load_controlnet, save_controlnet
from controlnet.model.sampling.generate import Request, generate
from controlnet.preprocessors.errors import Exit, ModelError
from controlnet.preprocessors.images import png_bytes
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from helpers import randomise, small_unet
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"
FAMILIES = pytest.mark.parametrize("family", [SD1, SD2], ids=lambda f: f.name)


def empty(cls, config):
    with init_empty_weights():
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(CLIPTextConfig.from_dict(config))


def text_state(family):
    state = empty(CLIPTextModel, dict(family.encoders[0].config)).state_dict()
    return {k.removeprefix("text_model."): t for k, t in state.items()}


@FAMILIES
def test_names_of_the_unet(family):
    state = empty(UNet2DConditionModel, dict(family.unet)).state_dict()
    ours = names.rename(state, names.reverse(names.unet(family.unet)))
    assert len(ours) == len(state) == 686
    back = theirs.convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": t for k, t in ours.items()}, family.unet)
    assert back.keys() == state.keys() and all(back[k] is state[k] for k in state)


@FAMILIES
def test_names_of_the_controlnet(family):
    net = ControlNet.from_base(empty(UNet2DConditionModel, dict(family.unet)))
    config = family.unet | {"conditioning_embedding_out_channels": list(net.hint_widths)}
    state = net.state_dict()
    ours = names.rename(state, names.reverse(names.controlnet(config)))
    assert len(ours) == len(state) == 340
    back = theirs.convert_controlnet_checkpoint({f"control_model.{k}": t for k, t in ours.items()}, config)
    assert back.keys() == state.keys() and all(back[k] is state[k] for k in state)


def test_names_of_the_vae():
    torch.manual_seed(0)
    config = VAE | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
    state = AutoencoderKL.from_config(config).state_dict()
    ours = names.convolution_attention(names.rename(state, names.reverse(names.vae(config))))
    assert len(ours) == len(state) and ours["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    back = theirs.convert_ldm_vae_checkpoint({f"first_stage_model.{k}": t for k, t in ours.items()}, config)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    again = names.linear_attention(names.rename(ours, names.vae(config)))
    assert all(torch.equal(again[k], state[k]) for k in state)


def test_names_of_open_clip():
    config = dict(SD2.encoders[0].config) | {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 20
    }  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig.from_dict(config))
    state = {k.removeprefix("text_model."): t for k, t in text.state_dict().items()}
    ours = {f"{SD2.encoders[0].prefix}{k}": t for k, t in to_open_clip(state, config).items()}
    back = {k.removeprefix("text_model."): t for k, t in theirs.convert_open_clip_checkpoint(text, ours).items()}
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_names_of_clip():
    state = text_state(SD1)
    ours = {f"{SD1.encoders[0].prefix}text_model.{k}": t for k, t in state.items()}
    back = {k.removeprefix("text_model."): t for k, t in theirs.convert_ldm_clip_checkpoint(ours).items()}
    assert back.keys() == state.keys()


def test_the_vocabulary_is_clips():
    vocabulary = clip_vocabulary(MERGES.read_text())
    assert len(vocabulary) == 49408 and sorted(vocabulary.values()) == list(range(49408))
    known = {"a</w>": 320, "photo</w>": 1125, "of</w>": 539, "cat</w>": 2368, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known


def test_a_net_goes_both_ways(small_base_folder, tmp_path):
    """And other programs' readers find in our file what they look for."""
    source = small_base_folder / "net"
    convert(source, tmp_path / "net.safetensors", "original")
    convert(tmp_path / "net.safetensors", tmp_path / "net", "diffusers")
    before = load_file(source / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "net/diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    original = load_file(tmp_path / "net.safetensors")
    assert "control_model.zero_convs.0.0.weight" in original and len(original) == len(before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "net")]
    assert configs[0].items() <= configs[1].items()
    loaded = load_controlnet(tmp_path / "net.safetensors").state_dict()
    assert all(torch.equal(before[k], loaded[k]) for k in before)


@pytest.fixture(scope="module", params=[SD1, SD2], ids=lambda f: f.name)
def narrow(request, tmp_path_factory):
    """(family, folder): a base of the family's layout and text width, but narrow, in diffusers' layout."""
    family, folder = request.param, tmp_path_factory.mktemp("narrow") / "base"
    torch.manual_seed(2)
    config = dict(family.unet) | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "attention_head_dim": 2}
    text = dict(family.encoders[0].config) | {"num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 49408}
    unet = UNet2DConditionModel.from_config(config | {"sample_size": 8})
    vae = AutoencoderKL.from_config(VAE | {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2})
    encoder = CLIPTextModel(CLIPTextConfig.from_dict(text))
    write_tokenizer(folder.parent / "tokens", family.encoders[0].pad_token)
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=encoder, tokenizer=CLIPTokenizer.from_pretrained(folder.parent / "tokens"),
        scheduler=DDIMScheduler.from_config(scheduler_config("epsilon" if family is SD1 else "v_prediction")),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return family, folder


def picture(base, net):
    size = 64
    torch.manual_seed(0)
    condition = torch.randint(0, 255, (size, size, 3), dtype=torch.uint8).numpy()
    request = Request("a red cube", 1, (condition,))
    return next(generate(base, [request], [(net, Strength())], (size, size), 2, 3.0))


def test_a_base_goes_both_ways_and_makes_the_same_image(narrow, run, tmp_path):
    family, folder = narrow
    convert(folder, tmp_path / "base.safetensors", "original")
    convert(tmp_path / "base.safetensors", tmp_path / "base", "diffusers")
    for part in ("unet", "vae", "text_encoder"):
        stem = STEMS[part]
        before = load_file(folder / part / f"{stem}.safetensors")
        after = load_file(tmp_path / "base" / part / f"{stem}.safetensors")
        bare = {k.removeprefix("text_model."): t for k, t in after.items()}
        before = {k.removeprefix("text_model."): t for k, t in before.items()}
        assert before.keys() == bare.keys() and all(torch.equal(before[k], bare[k]) for k in before)
    bases = [load_base(str(path)) for path in (folder, tmp_path / "base.safetensors", tmp_path / "base")]
    net = randomise(ControlNet.from_base(bases[0].unet, hint_widths=(4, 4, 8, 8)))
    images = [picture(base, net) for base in bases]
    assert (images[0] == images[1]).all() and (images[0] == images[2]).all() and images[0].std() > 1
    StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    told = json.loads(run("models", "show", "--json", tmp_path / "base.safetensors")[1])
    assert told["family"] == family.name and told["what"] == "base" and told["dtype"] == ["float32"]
    assert told["prediction"] == ("epsilon" if family is SD1 else "v_prediction")
    assert told["parameters"]["unet"] == sum(p.numel() for p in bases[0].unet.parameters())


def test_an_old_pickle_with_base_and_net(narrow, tmp_path, monkeypatch):
    """Version 1.0 files hold both, beside what training left in them; the one class in old .ckpt files does nothing."""
    _, folder = narrow
    base = load_base(str(folder))
    net = randomise(ControlNet.from_base(base.unet, hint_widths=(4, 4, 8, 8)))
    save_controlnet(net, tmp_path / "net")
    convert(folder, tmp_path / "base.safetensors", "original")
    convert(tmp_path / "net", tmp_path / "net.safetensors", "original")
    state = load_file(tmp_path / "base.safetensors") | load_file(tmp_path / "net.safetensors")
    state |= {"model_ema.decay": torch.ones(()), "betas": torch.zeros(1000)}
    path = tmp_path / "control.ckpt"
    callback = type("ModelCheckpoint", (), {"__module__": CALLBACK})
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", CALLBACK):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(ModelCheckpoint=callback))
    torch.save({"state_dict": state, "callbacks": {callback: {"best": None}}, "global_step": 1}, path)
    monkeypatch.undo()
    stored = open_model(path)
    assert stored.parts == ("controlnet", "unet", "vae", "text_encoder")
    assert len(stored.headers("unet")) == len(base.unet.state_dict())
    # Without our metadata the widths of the family are expected, and these are narrower.
    with pytest.raises(ModelError, match="weights lack"):
        load_controlnet(path)


def test_a_pickle_with_code_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "callback": Marker()}, path)
    with pytest.raises(ModelError, match="refused and nothing in it was run"):
        open_model(path)
    path.write_bytes(pickle.dumps({"a": 1})[:5])
    with pytest.raises(ModelError, match="cannot be read"):
        open_model(path)


class Marker:
    """A class that a pickle names and nobody admits."""


def test_what_is_no_model_is_named(tmp_path):
    for name, what in (
        ("lora_unet_down.weight", "a LoRA"),
        ("conditioner.embedders.0.x", "SDXL"),
        ("a", "unknown names"),
    ):
        write_tensors(tmp_path / "x.safetensors", {name: torch.zeros(1)})
        with pytest.raises(ModelError, match=what):
            open_model(tmp_path / "x.safetensors")


def test_flipped_and_cut_files(small_base_folder, run, tmp_path):
    data = bytearray((small_base_folder / "net/diffusion_pytorch_model.safetensors").read_bytes())
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    data[20] ^= 0xFF
    (tmp_path / "flipped.safetensors").write_bytes(data)
    for name in ("cut", "flipped"):
        code, _, err = run("models", "show", tmp_path / f"{name}.safetensors")
        assert code == 5 and "error:" in err and "hint:" in err


def test_families_are_told_apart_before_weights_are_read(narrow, run, tmp_path):
    """The base's weights are gone, and the message is still about the families."""
    family, folder = narrow
    other = SD2 if family is SD1 else SD1
    shutil.copytree(folder, tmp_path / "base")
    for path in (tmp_path / "base").rglob("*.safetensors"):
        path.unlink()
    net = ControlNet.from_base(small_unet(cross_attention_dim=other.unet["cross_attention_dim"]))
    save_controlnet(net, tmp_path / "net")
    (tmp_path / "net/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "map.canny.png").write_bytes(png_bytes(np.zeros((64, 64, 3), np.uint8)))
    cond = f"{tmp_path / 'map.canny.png'},net={tmp_path / 'net'}"
    code, _, err = run("generate", "--base", tmp_path / "base", "--prompt", "a", "--cond", cond)
    assert code == 5 and family.name in err and other.name in err


def test_a_scheduler_that_says_nothing_predicts_epsilon(narrow, tmp_path):
    """As the configs of SD 1.x's first repositories are."""
    _, folder = narrow
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old/scheduler/scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "prediction_type"}))
    convert(tmp_path / "old", tmp_path / "old.safetensors", "original")
    assert open_model(tmp_path / "old.safetensors").prediction() == "epsilon"


def test_an_sd2_file_must_be_told_its_prediction(narrow, tmp_path):
    family, folder = narrow
    convert(folder, tmp_path / "told.safetensors", "original")
    tensors = load_file(tmp_path / "told.safetensors")
    write_tensors(tmp_path / "silent.safetensors", tensors)
    stored = find_base(str(tmp_path / "silent.safetensors"))
    assert stored.prediction() is None
    if family is SD1:
        assert stored.scheduler()["prediction_type"] == "epsilon"
        return
    with pytest.raises(ModelError, match="epsilon or v"):
        stored.scheduler()
    write_tensors(tmp_path / "said.safetensors", tensors, {"modelspec.prediction_type": "v"})
    assert find_base(str(tmp_path / "said.safetensors")).scheduler()["prediction_type"] == "v_prediction"


def test_the_command_converts_and_leaves_what_is_there(small_base_folder, run, tmp_path):
    convert = partial(run, "models", "convert")
    source, out = small_base_folder / "net", tmp_path / "net.safetensors"
    assert convert(source, out, "--to", "original")[0] == 0
    code, _, err = convert(source, out, "--to", "original")
    assert code == 4 and "--overwrite" in err
    assert convert(source, out, "--to", "originl")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    assert convert(out, tmp_path / "full", "--to", "diffusers", "--overwrite")[0] == 4
    assert (tmp_path / "full/letter.txt").is_file()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
    assert convert(out, tmp_path / "again", "--to", "diffusers")[0] == 0
    (tmp_path / "again/run.json").write_text("{}")
    assert convert(out, tmp_path / "again", "--to", "diffusers", "--overwrite")[0] == 4
    (tmp_path / "again/run.json").unlink()
    assert convert(out, tmp_path / "again", "--to", "diffusers", "--overwrite")[0] == 0
    code, _, err = convert(small_base_folder / "base", tmp_path / "b.safetensors", "--to", "original")
    assert code == 5 and "text features of width 16" in err


@pytest.mark.slow
@FAMILIES
def test_full_size_single_files(family, tmp_path):
    """A base and its ControlNet as other programs write them: half precision, no word on their configs."""
    torch.manual_seed(3)
    parts = {"unet": empty(UNet2DConditionModel, dict(family.unet)), "vae": empty(AutoencoderKL, dict(VAE))}
    net = ControlNet.from_base(parts["unet"])
    state = {f"first_stage_model.{k}": t for k, t in names.convolution_attention(
        names.rename(parts["vae"].state_dict(), names.reverse(names.vae(VAE)))).items()}  # fmt: skip
    state |= {f"model.diffusion_model.{k}": t for k, t in names.rename(
        parts["unet"].state_dict(), names.reverse(names.unet(family.unet))).items()}  # fmt: skip
    text = text_state(family)
    if family is SD2:
        text = {k: torch.empty(t.shape) for k, t in text.items()}
        text = to_open_clip(text, dict(family.encoders[0].config)) | {"text_projection": torch.empty(1024, 1024)}
        text = {k: t.to("meta") for k, t in text.items()}
    else:
        text = {f"text_model.{k}": t for k, t in text.items()}
    state |= {family.encoders[0].prefix + k: t for k, t in text.items()}
    config = family.unet | {"conditioning_embedding_out_channels": list(net.hint_widths)}
    state |= {f"control_model.{k}": t for k, t in names.rename(
        net.state_dict(), names.reverse(names.controlnet(config))).items()}  # fmt: skip
    zeros = {k: torch.zeros(t.shape, dtype=torch.float16) for k, t in state.items()}
    zeros["model.diffusion_model.out.2.bias"] += 1
    zeros["control_model.zero_convs.3.0.bias"] += 2
    write_tensors(
        tmp_path / "v10.safetensors", zeros, {"modelspec.prediction_type": "v" if family is SD2 else "epsilon"}
    )
    base = load_base(str(tmp_path / "v10.safetensors"), dtype=torch.float16)
    assert (base.unet.conv_out.bias == 1).all() and base.native_size == (768 if family is SD2 else 512)
    assert base.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    loaded = load_controlnet(tmp_path / "v10.safetensors", None, base.unet.config)
    assert (loaded.controlnet_down_blocks[3].bias == 2).all() and loaded.conv_in.weight.dtype == torch.float16


def test_the_numbers_depend_on_the_tensors_not_on_the_file(small_base_folder, tmp_path):
    """A file's header decides where its tensors lie in memory; kernels round otherwise where they are not aligned."""
    folder = tmp_path / "base"
    shutil.copytree(small_base_folder / "base", folder)
    unet_file = folder / "unet/diffusion_pytorch_model.safetensors"
    unet, net = load_file(unet_file), load_file(small_base_folder / "net/diffusion_pytorch_model.safetensors")
    shutil.copy(small_base_folder / "net/config.json", tmp_path / "config.json")
    images, places = [], set()
    for length in range(16):
        write_tensors(unet_file, unet, {"filler": "x" * (8 * length)})
        write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", net, {"filler": "x" * (8 * length)})
        base, one = load_base(str(folder)), load_controlnet(tmp_path)
        tensors = [*base.unet.parameters(), *one.parameters(), *base.vae.parameters()]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
        places |= {tensor.data_ptr() % 64 for tensor in read_tensors(unet_file).values()}
        images.append(picture(base, one))
    assert len(places) >= 8 and all((image == images[0]).all() for image in images)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_and_cast(small_base_folder, run, tmp_path, dtype):
    """Nothing is computed in it; float16 holds every number of it."""
    state = load_file(small_base_folder / "net/diffusion_pytorch_model.safetensors")
    small = {name: tensor.to(dtype) for name, tensor in state.items()}
    for folder in ("net", "bad"):
        (tmp_path / folder).mkdir()
        shutil.copy(small_base_folder / "net/config.json", tmp_path / folder)
    write_tensors(tmp_path / "net/diffusion_pytorch_model.safetensors", small)
    net = load_controlnet(tmp_path / "net", None)
    assert all((net.state_dict()[name].float() == tensor.float()).all() for name, tensor in small.items())
    assert {p.dtype for p in net.parameters()} == {torch.float16}
    assert {p.dtype for p in load_controlnet(tmp_path / "net").parameters()} == {torch.float32}
    code, out, _ = run("models", "show", tmp_path / "net")
    assert code == 0 and str(dtype).removeprefix("torch.") in out
    convert(tmp_path / "net", tmp_path / "one.safetensors", "original")
    assert {t.dtype for t in read_tensors(tmp_path / "one.safetensors").values()} == {dtype}
    name = next(iter(small))
    small[name] = torch.full_like(state[name], torch.nan).to(dtype)
    write_tensors(tmp_path / "bad/diffusion_pytorch_model.safetensors", small)
    with pytest.raises(ModelError, match="NaN"):
        load_controlnet(tmp_path / "bad")


def test_keys_that_a_config_leaves_out_are_the_librarys(small_base_folder, tmp_path):
    config = json.loads((small_base_folder / "net/config.json").read_text())
    for key in ("norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos", "freq_shift", "in_channels"):
        if key in config and key != "norm_num_groups":
            del config[key]
    shutil.copytree(small_base_folder / "net", tmp_path / "net")
    (tmp_path / "net/config.json").write_text(json.dumps(config))
    before, after = load_controlnet(small_base_folder / "net"), load_controlnet(tmp_path / "net")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert open_model(tmp_path / "net").config("controlnet")["conditioning_channels"] == 3
    from diffusers import ControlNetModel

    full = ControlNetModel(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    full.save_pretrained(tmp_path / "full")
    config = json.loads((tmp_path / "full/config.json").read_text())
    assert config.pop("conditioning_embedding_out_channels") == [16, 32, 96, 256]
    (tmp_path / "full/config.json").write_text(json.dumps(config))
    assert load_controlnet(tmp_path / "full").hint_widths == (16, 32, 96, 256)


@pytest.mark.parametrize("text", ["null", "[]", "5", "{", "[" * 100_000, '{"_class_name": "ControlNetModel"}',
                                  '{"_class_name": "ControlNetModel", "block_out_channels": "abc"}',
                                  '{"_class_name": "ControlNetModel", "down_block_types": 5}'])  # fmt: skip
def test_configs_that_are_none(small_base_folder, run, tmp_path, text):
    shutil.copytree(small_base_folder / "net", tmp_path / "net")
    (tmp_path / "net/config.json").write_text(text)
    with pytest.raises(ModelError):
        load_controlnet(tmp_path / "net")
    assert run("models", "show", tmp_path / "net")[0] in (0, Exit.MODEL)


def test_configs_in_the_metadata_that_are_none(small_base_folder, run, tmp_path):
    state = load_file(small_base_folder / "net/diffusion_pytorch_model.safetensors")
    for configs in ('{"controlnet": 5}', "null", "[1]", "{", "[" * 100_000):
        write_tensors(tmp_path / "net.safetensors", state, {"controlnet_toolkit.configs": configs})
        code, _, err = run("models", "show", tmp_path / "net.safetensors")
        assert (code == Exit.MODEL and "controlnet_toolkit.configs" in err) or "config of its controlnet" in err
