"""Finding, identifying and refusing models."""

import json
import shutil

import pytest
import torch
from controlnet.model.files.hashes import model_hash
from controlnet.model.files.tensors import read_weights
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet, save_controlnet
from controlnet.model.sampling.schedulers import SCHEDULERS, make_scheduler
from controlnet.preprocessors.errors import ModelError, UsageError


def test_what_a_base_says_of_itself(small_base_folder):
    base = load_base(str(small_base_folder / "base"))
    assert base.guidance == 7.5 and base.native_size == 64 and base.factor == 8


@pytest.mark.parametrize("part, change, said", [
    ("vae", {"_class_name": "VQModel"}, "expected AutoencoderKL or AutoencoderTiny"),
    ("unet", {"_class_name": "UNet3D"}, "expected UNet2DConditionModel"),
    ("unet", {"time_cond_proj_dim": 256}, "reads more than the time"),
    ("unet", {"class_embed_type": "projection"}, "reads more than the time"),
    ("text_encoder", {"architectures": ["T5"]}, "expected CLIPTextModel"),
])  # fmt: skip
def test_a_base_of_other_classes_is_refused(small_base_folder, tmp_path, part, change, said):
    folder = shutil.copytree(small_base_folder / "base", tmp_path / "base")
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=said):
        load_base(str(folder))
    path.write_text("{not json")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_base(str(folder))


def test_an_unknown_scheduler_in_the_base(small_base_folder, tmp_path):
    folder = shutil.copytree(small_base_folder / "base", tmp_path / "base")
    config = {"_class_name": "DPMSolverSDEScheduler", "use_karras_sigmas": True}  # needs a package that is missing
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    scheduler = load_base(str(folder)).scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler" and scheduler.config.use_karras_sigmas
    assert scheduler.config.algorithm_type == "sde-dpmsolver++"
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "NoScheduler"}')
    with pytest.raises(ModelError, match="NoScheduler"):
        load_base(str(folder))


def test_schedulers_keep_the_bases_noise_schedule(small_base_folder):
    own = load_base(str(small_base_folder / "base")).scheduler
    for name in SCHEDULERS:
        assert torch.equal(make_scheduler(own, name).alphas_cumprod, own.alphas_cumprod)
        assert make_scheduler(own, name).config.prediction_type == own.config.prediction_type
    with pytest.raises(UsageError, match="'dimm'") as caught:
        make_scheduler(own, "dimm")
    assert caught.value.hint == "--scheduler ddim"


def test_a_folders_hash_follows_its_weights(small_base_folder, tmp_path):
    folder = shutil.copytree(small_base_folder / "net", tmp_path / "net")
    first = model_hash(folder)
    assert first == model_hash(folder) == model_hash(small_base_folder / "net")
    (folder / "config.json").write_text("{}")
    assert model_hash(folder) == first
    path = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert model_hash(folder) != first


@pytest.mark.parametrize("hint", ["released", "paper"])
def test_a_net_survives_its_file(small_base_folder, tmp_path, hint):
    from controlnet.model.control.controlnet import ControlNet
    from helpers import randomise, small_unet

    net = randomise(ControlNet.from_base(small_unet(), hint, (4, 4, 8, 8)))
    save_controlnet(net, tmp_path / "half", torch.float16)
    save_controlnet(net, tmp_path / "full")
    again = load_controlnet(tmp_path / "full")
    assert len({path.stat().st_mode for path in (tmp_path / "full").iterdir()}) == 1
    assert again.hint == hint and not again.training
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in net.state_dict().items())
    assert {t.dtype for t in read_weights(tmp_path / "half", "diffusion_pytorch_model").values()} == {torch.float16}


def test_shards_and_variants_are_read(small_base_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(small_base_folder / "net/diffusion_pytorch_model.safetensors")
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: state[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert read_weights(tmp_path, "diffusion_pytorch_model").keys() == state.keys()
    (tmp_path / "half").mkdir()
    save_file(state, tmp_path / "half/diffusion_pytorch_model.fp16.safetensors")
    assert read_weights(tmp_path / "half", "diffusion_pytorch_model").keys() == state.keys()
    torch.save(state, tmp_path / "half/other.bin")
    assert read_weights(tmp_path / "half", "other").keys() == state.keys()
