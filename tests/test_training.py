"""What a run does: what moves, what resumes, what the files are."""

import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from controlnet.model.control.lite import ControlNetLite
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.report import read_run
from controlnet.model.training.run import train
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.errors import TrainingError, UsageError
from diffusers import ControlNetModel
from helpers import log_of, losses

CPU = torch.device("cpu")


def test_only_the_controlnet_moves_and_files_are_whole(data, config, tmp_path):
    base = load_base(config.base)
    hashes = model_hash(base.path)
    progress = train(find_pairs(data), config, tmp_path / "run", CPU)
    assert progress.step == 6
    assert model_hash(base.path) == hashes
    rows = log_of(tmp_path / "run")
    assert [r["step"] for r in rows if "control_gap" in r] == [0, 3, 6]
    assert next(r for r in rows if r["step"] == 0)["control_gap"] == 0.0
    assert [r for r in rows if "control_gap" in r][-1]["control_gap"] != 0.0
    assert rows[-1] == {"step": 6, "ended": "finished"} and read_run(tmp_path / "run").state == "finished"
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "README.md", "checkpoints", "config.json", "config.toml", "curve.png", "diffusion_pytorch_model.safetensors",
        "log.jsonl", "pictures", "run.json", "samples.png",
    }  # fmt: skip
    ours = load_controlnet(tmp_path / "run", base=base.unet.config)
    theirs = ControlNetModel.from_pretrained(tmp_path / "run")
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert any(p.abs().max() > 0 for p in ours.controlnet_down_blocks.parameters())
    best = min((r for r in rows if "control_gap" in r), key=lambda r: r["validation_loss"])
    card = (tmp_path / "run/README.md").read_text()
    assert f"Network of step {best['step']}" in card and f"Validation loss {best['validation_loss']:.4f}" in card


def test_the_base_in_training_is_locked(data, config, tmp_path, monkeypatch):
    """The very tensors of the base that training runs on are unchanged, bit for bit."""
    import controlnet.model.training.run as module

    loaded = []
    monkeypatch.setattr(module, "load_base", lambda *a, **k: loaded.append(load_base(*a, **k)) or loaded[-1])
    before = {k: v.clone() for k, v in load_base(config.base).unet.state_dict().items()}
    train(find_pairs(data), config, tmp_path / "run", CPU)
    assert all(torch.equal(v, before[k]) for k, v in loaded[0].unet.state_dict().items())
    assert loaded[0].vae is None and loaded[0].text_encoder is None  # not in memory while training


def test_a_run_resumed_is_the_run_uninterrupted(data, config, tmp_path):
    found = find_pairs(data)
    train(found, config, tmp_path / "whole", CPU)
    train(found, replace(config, max_steps=2), tmp_path / "cut", CPU)
    train(found, config, tmp_path / "cut", CPU, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    a, b = (Checkpoints(tmp_path / n / "checkpoints").load() for n in ("whole", "cut"))
    for key in ("parameters", "ema"):
        assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True))


def test_losses_are_the_same_without_cache(data, config, tmp_path):
    found = find_pairs(data)
    train(found, config, tmp_path / "with", CPU)
    train(found, replace(config, cache=False), tmp_path / "without", CPU)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True}, {"batch_size": 2, "accumulation": 2},
        {"gradient_checkpointing": True, "precision": "bfloat16"},
    ],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_ways_that_give_the_same_losses(data, config, tmp_path, change):
    found = find_pairs(data)
    config = replace(config, precision=change.get("precision", "float32"))
    train(found, config, tmp_path / "plain", CPU)
    train(found, replace(config, **change), tmp_path / "other", CPU)
    plain, other = (np.array([loss for _, loss in losses(tmp_path / n)]) for n in ("plain", "other"))
    assert np.allclose(plain, other, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"copy": "lite"}, {"convolutions": "gaussian"}, {"hint": "paper"}, {"precision": "bfloat16"},
        {"precision": "float16"},
        {"min_snr": 5.0}, {"flip": True, "crops": 2}, {"kind": "canny", "prompt_dropout": 1.0},
    ],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_every_form_trains_and_is_read_again(data, config, tmp_path, change):
    train(find_pairs(data), replace(config, **change), tmp_path / "run", CPU)
    net = load_controlnet(tmp_path / "run")
    assert isinstance(net, ControlNetLite) == (change.get("copy") == "lite")
    first = log_of(tmp_path / "run")[0]
    assert (first["control_gap"] == 0.0) == ("convolutions" not in change)


def test_it_goes_on_from_another_controlnet(data, config, small_base_folder, tmp_path):
    folder = str(small_base_folder / "net")
    train(find_pairs(data), replace(config, start_from=folder, learning_rate=1e-12), tmp_path / "run", CPU)
    before, after = load_controlnet(folder), load_controlnet(tmp_path / "run")
    assert all(torch.allclose(v, before.state_dict()[k], atol=1e-6) for k, v in after.state_dict().items())


def test_the_held_out_loss_falls(data, config, tmp_path):
    config = replace(config, max_steps=20, learning_rate=5e-3, validate_every=10, pictures=0)
    train(find_pairs(data), config, tmp_path / "run", CPU)
    found = [r["validation_loss"] for r in log_of(tmp_path / "run") if "control_gap" in r]
    assert len(found) == 3 and found[0] > found[1] > found[2] and found[2] < 0.95 * found[0]


def test_its_form_is_that_of_the_network_it_goes_on_from(data, config, tmp_path):
    train(find_pairs(data), replace(config, hint="paper", copy="lite"), tmp_path / "first", CPU)
    config = replace(config, start_from=str(tmp_path / "first"))
    train(find_pairs(data), config, tmp_path / "second", CPU)
    settings = read_run(tmp_path / "second").record["settings"]
    assert (settings["hint"], settings["copy"]) == ("paper", "lite")
    assert "diffusers cannot load it" in (tmp_path / "second/README.md").read_text()
    with pytest.raises(UsageError, match="convolutions=gaussian, but"):
        train(find_pairs(data), replace(config, convolutions="gaussian"), tmp_path / "third", CPU)


def test_a_run_by_minutes_ends_with_a_last_look(data, config, tmp_path):
    config = replace(config, max_steps=10_000, minutes=0.02, validate_every=10_000, pictures=0, save_every=1e-9)
    progress = train(find_pairs(data), config, tmp_path / "run", CPU)
    run = read_run(tmp_path / "run")
    assert 0 < progress.step < 10_000 and run.state == "finished"
    assert run.validations[-1]["step"] == progress.step and run.verdict.word != "waiting"


@pytest.mark.parametrize("setting", [{"copy": "lite"}, {"hint": "paper"}])
def test_a_run_cannot_go_on_as_another_network(data, config, tmp_path, setting):
    """Not by force either; its checkpoints stay."""
    train(find_pairs(data), replace(config, max_steps=2), tmp_path / "run", CPU)
    with pytest.raises(UsageError, match="another network"):
        train(find_pairs(data), replace(config, max_steps=4, **setting), tmp_path / "run", CPU, True, True)
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [2]


def test_an_explosion_keeps_the_good_state(data, config, tmp_path):
    """Ten good steps, then a rate that no network survives."""
    config = replace(config, max_steps=10, validate_every=5, save_every=1e-9)
    train(find_pairs(data), config, tmp_path / "run", CPU)
    good = Checkpoints(tmp_path / "run/checkpoints").load()
    config = replace(config, max_steps=60, learning_rate=1e6, clip_norm=1e9)
    with pytest.raises(TrainingError, match="checkpoints before are kept") as error:
        train(find_pairs(data), config, tmp_path / "run", CPU, resume=True, force=True)
    assert "learning_rate=" in error.value.hint
    state = Checkpoints(tmp_path / "run/checkpoints").load()
    largest = max(float(p.abs().max()) for p in good["parameters"])
    assert all(float(p.abs().max()) < 10 * largest for p in state["parameters"])
    assert read_run(tmp_path / "run").state == "exploded"
    assert all(p.isfinite().all() for p in load_controlnet(tmp_path / "run").parameters())


def test_tar_files_train_as_their_folder_does(data, config, tmp_path):
    """The same losses to the bit: samples, order and noise do not depend on where the pictures lie."""
    (tmp_path / "tars").mkdir()
    for number, half in enumerate((sorted(data.glob("*.png"))[:6], sorted(data.glob("*.png"))[6:])):
        with tarfile.open(tmp_path / f"tars/{number:06d}.tar", "w") as tar:
            for picture in half:
                for path in (picture, picture.with_suffix(".txt")):
                    tar.add(path, path.name)
    train(find_pairs(data), config, tmp_path / "a", CPU)
    train(find_pairs(tmp_path / "tars"), config, tmp_path / "b", CPU)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
