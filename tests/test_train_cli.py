"""`controlnet train` and `status` as users meet them: settings, refusals, what is said."""

import fcntl
import json
import os
import shutil
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.config import TrainConfig, read_config, to_toml
from controlnet.model.training.data import split
from controlnet.model.training.run import Watcher, train
from controlnet.model.training.runfolder import claimed, next_run
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.errors import Exit, InputError, TrainingError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.lock import is_locked, locked
from diffusers import DiffusionPipeline
from helpers import run

CPU = torch.device("cpu")


def test_two_words_are_enough_and_status_tells(data, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLNET_BASE", config.base)
    sets = [f"--set={key}={value}" for key, value in
            {"max_steps": 4, "batch_size": 2, "validate_every": 2, "held_out": 2}.items()]  # fmt: skip
    assert run("train", data, *sets) == 0
    out, err = capsys.readouterr()
    assert out == "runs/photos-1\n" and "step 4 of 4, finished" in err
    assert "kind canny (made from the photos by our detector)" in err and "4 steps" in err
    assert run("status", "runs/photos-1") == 0
    assert "step 4 of 4, finished" in capsys.readouterr().out
    assert run("status", "runs/photos-1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["state"]) == (4, "finished")
    assert told["verdict"] in ("overdue", "begun", "converged") and told["band"] >= 0

    record = json.loads(Path("runs/photos-1/run.json").read_text())
    del record["settings"]["optimizer"]  # a run from before there was this setting
    Path("runs/photos-1/run.json").write_text(json.dumps(record))
    assert run("train", data, "--resume", "--set", "max_steps=6") == 0
    assert "goes on at step 4" in capsys.readouterr().err
    assert run("train", data, "--resume", "--set", "learning_rate=0.5") == Exit.USAGE
    assert "learning_rate was 1e-05, is 0.5" in capsys.readouterr().err
    assert run("train", data, "--resume", "--set", "max_steps=5") == Exit.USAGE
    assert "max_steps=5: the run is at step 6 already" in capsys.readouterr().err
    assert run("train", data, *sets) == 0
    assert capsys.readouterr().out == "runs/photos-2\n"

    shutil.copytree(data, tmp_path / "more")
    (tmp_path / "more/0.png").unlink()
    assert run("train", tmp_path / "more", "--resume", "-o", "runs/photos-1") == Exit.USAGE
    changed = "the data's file names, captions, held-out split, contents changed (12 pairs then, 11 now)"
    assert changed in capsys.readouterr().err
    shutil.copytree(data, tmp_path / "other")
    write_file(tmp_path / "other/0.png", (data / "1.png").read_bytes())
    assert run("train", tmp_path / "other", "--resume", "-o", "runs/photos-1") == Exit.USAGE
    assert "the data's contents changed" in capsys.readouterr().err

    map_ = tmp_path / "m.canny.png"
    write_file(map_, png_bytes(np.eye(64, dtype=np.uint8) * 255))
    assert run("generate", "--cond", f"{map_},net=runs/photos-1", "--prompt", "x", "--steps", "2", "-o", "x.png") == 0


def test_settings_from_file_and_flags(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('learning_rate = 2e-4\nkind = "blueprint"\nflip = true\nmax_steps = 7\n')
    config = read_config([path], ["max_steps=9", "flip=false"], seed=3)
    assert (config.learning_rate, config.kind, config.max_steps, config.flip, config.seed) == (
        2e-4, "blueprint", 9, False, 3
    )  # fmt: skip
    assert read_config([], []).learning_rate == 5e-4  # tiny's own
    assert read_config([], [], base="sd15").learning_rate == 1e-5
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config
    path.write_text('base = "sd15"\n')
    assert read_config([path], [], {"base": "tiny"}).base == "sd15"
    assert read_config([], ["base=sd15"], {"base": "tiny"}).base == "sd15"
    assert read_config([], [], {"base": "sd15"}).base == "sd15"


@pytest.mark.parametrize(
    "text, told",
    [
        ("max_step=3", "--set max_steps="), ("learning_rte=1", "--set learning_rate="),
        ("batch_size=2.5", "whole number"), ("flip=maybe", "true or false"), ("max_steps", "expected key=value"),
        ("learning_rate=-1", "above 0"),
        ("precision=int8", "one of float32"), ("prompt_dropout=2", "from 0 to 1"), ("size=500", "multiple of 8"),
        ("learning_rate=1e400", "got inf"), ("clip_norm=nan", "clip_norm"), ("clip_norm=0", "above 0"),
        ("copy=half", "one of full, lite"), ("learning_rate=nan", "learning_rate"), ("ema_decay=7", "from 0 to 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(text, told):
    with pytest.raises(UsageError) as error:
        read_config([], [text])
    assert told in f"{error.value} {error.value.hint}"


def test_bad_data_is_refused_before_training(data, config, tmp_path):
    for name in ("0.png", "0.txt"):
        write_file(tmp_path / "one" / name, (data / name).read_bytes())
    with pytest.raises(InputError, match="1 of at least 4 pairs"):
        train(find_pairs(tmp_path / "one"), config, tmp_path / "run", CPU)
    shutil.copytree(data, tmp_path / "black/images")
    for i in range(12):
        write_file(tmp_path / f"black/conditions/{i}.png", png_bytes(np.zeros((72, 96), np.uint8)))
    with pytest.raises(InputError, match="nothing to learn"):
        train(find_pairs(tmp_path / "black"), config, tmp_path / "run", CPU)
    shutil.copytree(data, tmp_path / "sizes/images")
    for i in range(12):
        write_file(tmp_path / f"sizes/conditions/{i}.png", png_bytes(np.eye(96, dtype=np.uint8) * 255))
    with pytest.raises(InputError, match="96x96 for a picture of 96x72"):
        train(find_pairs(tmp_path / "sizes"), config, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_conditions_that_look_wrong_are_told_before_training(data, config, tmp_path):
    """Inverted lines are warned of, or refused; a dense map among right ones is no inverted one."""
    shutil.copytree(data, tmp_path / "data/images")
    for i in range(12):
        photo, _ = read_image((data / f"{i}.png").read_bytes(), "")
        thick = cv2.dilate(canny(photo), np.ones((7, 7)))
        write_file(tmp_path / f"data/conditions/{i}.png", png_bytes(255 - thick))
    said = []
    with pytest.raises(InputError, match="12 of the first 12 conditions: inverted lines"):
        train(find_pairs(tmp_path / "data"), config, tmp_path / "run", CPU, strict=True)
    short = replace(config, max_steps=1, pictures=0)
    train(find_pairs(tmp_path / "data"), short, tmp_path / "run", CPU, watcher=Watcher(say=said.append))
    assert any("warning: 12 of the first 12 conditions: inverted lines" in text for text in said)
    said.clear()
    for i in range(12):
        dense = np.full((72, 96), 255 if i == 3 else 0, np.uint8)
        dense[20:50, 30:32] = 255 - dense[0, 0]
        write_file(tmp_path / f"data/conditions/{i}.png", png_bytes(dense))
    train(find_pairs(tmp_path / "data"), short, tmp_path / "right", CPU, watcher=Watcher(say=said.append))
    assert not any("inverted" in text for text in said)


def test_a_base_that_does_not_fit_is_refused(data, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", data, "--base", "nowhere") == Exit.USAGE
    assert "unknown base 'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    for part, key, value in (("unet", "cross_attention_dim", 24), ("vae", "latent_channels", 8)):
        shutil.copytree(config.base, tmp_path / part)
        network = DiffusionPipeline.from_pretrained(config.base).components[part]
        type(network).from_config({**network.config, key: value}).save_pretrained(tmp_path / part / part)
        assert run("train", data, "--base", tmp_path / part) == Exit.MODEL
        assert "the UNet's " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_those_who_look_do_not_keep_a_run_from_its_folder(tmp_path):
    """`status` asks by a lock of its own, which others share and `train` waits for."""
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    assert not is_locked(tmp_path)
    timer = threading.Timer(0.1, os.close, [handle])
    timer.start()
    with locked(tmp_path):
        assert is_locked(tmp_path)
    timer.join()


def test_a_folder_is_one_commands_alone(data, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)
        assert run("train", data, "--base", config.base, "-o", ".") == Exit.USAGE
    assert "another command is at work in it" in capsys.readouterr().err and not is_locked(tmp_path)
    folder = next_run(data, resume=False)
    with (
        claimed(folder, numbered=True) as (first, _),
        claimed(folder, numbered=True) as (second, _),
    ):  # at the same time
        assert (str(first), str(second)) == ("runs/photos-1", "runs/photos-2")
    assert not (tmp_path / "runs").exists()


def test_resuming_with_another_length_is_refused_when_the_rate_depends_on_it(data, config, tmp_path):
    found = find_pairs(data)
    config = replace(config, decay_fraction=0.5, max_steps=2)
    train(found, config, tmp_path / "run", CPU)
    with pytest.raises(UsageError, match="max_steps was 2, is 4"):
        train(found, replace(config, max_steps=4), tmp_path / "run", CPU, resume=True)


def test_memory_that_runs_out_says_what_halves_it(data, config, tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("controlnet.model.training.run.control_losses", full)
    with pytest.raises(TrainingError, match="out of memory with batch_size=4") as error:
        train(find_pairs(data), config, tmp_path / "run", CPU)
    assert "--set batch_size=2 --set accumulation=2" in error.value.hint
    with pytest.raises(TrainingError) as error:
        train(find_pairs(data), replace(config, batch_size=1), tmp_path / "one", CPU)
    assert "batch_size=" not in error.value.hint and "gradient_checkpointing=true" in error.value.hint
    monkeypatch.undo()
    monkeypatch.setattr("controlnet.model.training.run.load_base", full)
    with pytest.raises(TrainingError, match="out of memory"):
        train(find_pairs(data), config, tmp_path / "early", CPU)


def test_an_output_that_cannot_be_written_is_refused_first(data, config, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run("train", data, "--base", config.base, "-o", tmp_path / "file/run") == Exit.OUTPUT
    assert "cannot be written" in capsys.readouterr().err


def test_tensorboard_is_asked_for_by_name(data, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="not installed"):
        train(find_pairs(data), replace(config, tensorboard=True), tmp_path / "run", CPU)


def test_the_world_as_photos(tmp_path, monkeypatch):
    from controlnet.model.tiny.world import shards as dataset
    from controlnet.model.tiny.world.render import render
    from controlnet.model.tiny.world.scenes import make_scene

    scenes = [make_scene(i) for i in range(3)]
    drawn = render(scenes, 32)
    made = dataset.World(drawn.images.numpy(), *[np.zeros(3)] * 3, [s.caption for s in scenes])
    monkeypatch.setattr(dataset, "world", lambda *a, **k: made)
    found = find_pairs(dataset.world_photos(tmp_path, 3, 32))
    assert [p.caption for p in found.pairs] == made.captions
    assert np.array_equal(read_image(found.pairs[1].image.read_bytes(), "")[0], made.images[1])
    assert dataset.world_photos(tmp_path, 2, 32) != dataset.world_photos(tmp_path, 3, 32)


def test_what_fails_before_the_first_step_leaves_no_run(data, config, tmp_path, capsys):
    """Bad pictures are told, and the same command may be given again."""
    photos = shutil.copytree(data, tmp_path / "photos")
    for name in ("3.png", "7.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:60])
    flags = ("train", photos, "--base", config.base, "-o", tmp_path / "run", "--set", "max_steps=2")
    for _ in range(2):
        assert run(*flags) == Exit.INPUT
        err = capsys.readouterr().err
        assert "cut off" in err and "hint:" in err, err
        assert not (tmp_path / "run").exists()
    assert run("train", data, "--config", tmp_path) == Exit.INPUT
    assert "cannot be read" in capsys.readouterr().err
    assert run("train", data, "--set", "lr=3") == Exit.USAGE and "--set learning_rate" in capsys.readouterr().err


def test_a_picture_that_fails_in_the_middle_loses_nothing(data, config, tmp_path):
    found = find_pairs(shutil.copytree(data, tmp_path / "photos"))
    config = replace(config, cache=False, max_steps=40, validate_every=100)
    seen = []

    def spoil(progress):
        seen.append(progress.step)
        if progress.step == 3:
            for path in (tmp_path / "photos").glob("*.png"):
                path.write_bytes(b"no picture any more")

    with pytest.raises(InputError):
        train(found, config, tmp_path / "run", CPU, watcher=Watcher(on_step=spoil))
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [seen[-1]] and seen[-1] >= 3


def test_a_photo_without_anyone_is_named(data, config, tmp_path, monkeypatch):
    from controlnet.preprocessors.detectors.detector import Detector
    from controlnet.preprocessors.errors import NothingFoundError

    def nobody(image, place):
        raise NothingFoundError("nobody found", "--allow-empty")

    monkeypatch.setattr(Detector, "ready", lambda *args, **options: nobody)
    with pytest.raises(NothingFoundError, match=r"\d+\.png: nobody found") as caught:
        train(find_pairs(data), replace(config, kind="pose"), tmp_path / "run", CPU)
    assert "controlnet dataset build" in caught.value.hint


def test_few_held_out_pairs_are_filled_up(data, config):
    """A data set's own split of two says nothing: chance looks like control."""
    pairs = [replace(pair, held_out=i in (4, 5)) for i, pair in enumerate(find_pairs(data).pairs)]
    found = replace(find_pairs(data), pairs=pairs)
    training, held_out = split(found, config)
    assert len(held_out) == 3 and {pairs[4].image, pairs[5].image} <= {p.image for p in held_out}
    with pytest.raises(InputError, match="all its pictures are held out"):
        split(replace(found, pairs=[replace(pair, held_out=True) for pair in pairs]), config)
    assert len(training) == 9 and not {p.image for p in training} & {p.image for p in held_out}


def test_a_kind_of_ones_own_is_mirrored_and_remembered(data, config, tmp_path, monkeypatch, capsys):
    """`flip=true` takes its maps as pictures; the run says the kind where the map does not; runs stand side by side."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "pairs/images")
    for path in sorted((tmp_path / "pairs/images").glob("*.png")):
        write_file(tmp_path / "pairs/conditions" / path.name, path.read_bytes())
    settings = {"max_steps": 2, "batch_size": 2, "validate_every": 2, "held_out": 2, "flip": "true", "pictures": 0}
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    for seed in (0, 1):
        assert run("train", "pairs", "--base", config.base, "--kind", "mosaic", "--seed", seed, "-q", *sets) == 0
    write_file(tmp_path / "m.png", (data / "0.png").read_bytes())
    capsys.readouterr()
    flags = ["--base", config.base, "--prompt", "x", "--steps", "1", "-o", "x.png", "--json"]
    assert run("generate", "--cond", "m.png,net=runs/pairs-1", *flags) == 0
    assert json.loads(capsys.readouterr().out)["conditions"][0]["kind"] == "mosaic"
    assert run("status", "runs/pairs-1", "runs/pairs-2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "verdict", "since", "step", "gap", "noise", "loss"]
    assert [line.split()[0] for line in lines[1:3]] == ["runs/pairs-1", "runs/pairs-2"] and "curves.png" in lines[3]
    assert read_image((tmp_path / "runs/curves.png").read_bytes(), "x")[0].std() > 5


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONTROLNET_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.chdir(tmp_path)
    assert run("train", "world") == Exit.OUTPUT
    err = capsys.readouterr().err
    assert "the scenes cannot be kept there" in err and "CONTROLNET_CACHE=DIR" in err
