"""Training: what a batch is made of, what moves, what resumes, what the files are, and what is refused."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from controlnet.cli.main import main
from controlnet.model.ablations import ControlNetLite
from controlnet.model.base import load_base
from controlnet.model.checkpoint import load_controlnet
from controlnet.model.hashes import folder_hash
from controlnet.model.training.cache import Cache
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.config import TrainConfig, read_config, to_toml
from controlnet.model.training.run import train
from controlnet.model.training.samples import Samples
from controlnet.preprocessors.canny import canny
from controlnet.preprocessors.errors import Exit, InputError, OutputError, TrainingError, UsageError
from controlnet.preprocessors.images import png_bytes, read_image, write_file
from controlnet.preprocessors.pairs import find_pairs
from diffusers import ControlNetModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve photos (72, 96) of boxes on colours, with captions that name a side."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for i in range(12):
        image = np.full((72, 96, 3), rng.integers(0, 120, 3), np.uint8)
        x, y = rng.integers(4, 60), rng.integers(4, 40)
        image[y : y + 24, x : x + 24] = rng.integers(150, 255, 3)
        write_file(folder / f"{i}.png", png_bytes(image))
        (folder / f"{i}.txt").write_text(f"a cube on the {'left' if x < 32 else 'right'}, floor {i}")
    return folder


@pytest.fixture
def config(small_base_folder):
    return TrainConfig(
        base=str(small_base_folder / "base"), kind="canny", max_steps=6, batch_size=4, learning_rate=1e-3,
        warmup_steps=0, log_every=1, validate_every=3, held_out=3, pictures=1, save_every=1e9,
    )  # fmt: skip


def samples_of(data, config, cache=None, pairs=None):
    base = load_base(config.base)
    found = find_pairs(data)
    return Samples(pairs or list(found.pairs), config, base, folder_hash(base.folder), Cache(cache))


def tensors(batch):
    return [batch.z0, batch.eps, batch.t, batch.text, batch.condition]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(row["step"], row["loss"]) for row in log_of(folder) if "loss" in row]


def run(*args):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in args])
    return stopped.value.code


# What a batch is made of


def test_batches_are_the_same_with_and_without_cache(data, config, tmp_path):
    config = replace(config, crops=3, flip=True)
    plain, cached = samples_of(data, config), samples_of(data, config, tmp_path / "cache")
    cached.prepare(range(12))
    cached.base.unload()  # nothing is left to encode
    for k in (0, 3, 7):
        assert same(plain.batch(k), cached.batch(k))


def test_another_base_or_size_finds_nothing_in_the_cache(data, config, tmp_path):
    first = samples_of(data, config, tmp_path / "cache")
    first.prepare(range(12))
    for change in ("base", "size"):
        other = samples_of(data, config if change == "base" else replace(config, size=48), tmp_path / "cache")
        other.base_hash = "another" if change == "base" else other.base_hash
        other.base.unload()
        with pytest.raises(AttributeError):  # it has to encode again, and cannot
            other.moments(0, 0, False)


def test_a_damaged_cache_entry_is_made_again(data, config, tmp_path):
    samples = samples_of(data, config, tmp_path / "cache")
    expected = samples.moments(0, 0, False)
    (entry,) = (tmp_path / "cache/latents").rglob("*.npy")
    entry.write_bytes(entry.read_bytes()[:100])
    assert np.array_equal(samples.moments(0, 0, False), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_of_several_processes_are_the_batch_of_one(data, config, processes):
    samples = samples_of(data, replace(config, flip=True))
    for k in (0, 5):
        whole = tensors(samples.batch(k))
        parts = [tensors(samples.batch(k, i, processes)) for i in range(processes)]
        assert all(torch.equal(torch.cat(p), w) for w, *p in zip(whole, *parts, strict=True))


def test_an_epoch_sees_every_pair_once_and_the_next_one_in_another_order(data, config):
    samples = samples_of(data, replace(config, prompt_dropout=0.0))
    seen = [[t for k in range(3 * e, 3 * e + 3) for t in samples.batch(k).text.sum((1, 2)).tolist()] for e in (0, 1)]
    assert len(set(seen[0])) == 12 and sorted(seen[0]) == sorted(seen[1]) and seen[0] != seen[1]


def test_half_of_the_prompts_are_empty(data, config):
    samples = samples_of(data, config)
    empty = torch.from_numpy(samples.text("")).float()
    share = np.mean([(samples.batch(k).text == empty).all((1, 2)).float().mean() for k in range(60)])
    assert 0.4 < share < 0.6


def test_picture_and_condition_are_cut_and_flipped_alike(data, config, tmp_path):
    """Condition = the picture itself: after every crop and flip it must still be."""
    shutil.copytree(data, tmp_path / "images")
    shutil.copytree(data, tmp_path / "conditions")
    config = replace(config, kind="depth", crops=4, flip=True)
    samples = samples_of(tmp_path, config)
    pictures = set()
    for crop in range(4):
        for flip in (False, True):
            picture, condition = samples.picture(2, crop, flip), samples.condition(2, crop, flip)
            assert picture.shape == (64, 64, 3) and np.abs(picture.astype(int) - condition).max() <= 12
            pictures.add(picture.tobytes())
    assert len(pictures) == 8
    told = {samples.caption(2, False), samples.caption(2, True)}
    assert told == {"a cube on the left, floor 10", "a cube on the right, floor 10"}  # 10.png sorts before 2.png


def test_conditions_of_photos_are_what_detect_and_generate_make(data, config, tmp_path):
    from controlnet.model.canvas import to_canvas
    from controlnet.preprocessors.geometry import fit

    photo = np.kron(read_image((data / "0.png").read_bytes(), "")[0], np.ones((9, 9, 1), np.uint8))
    write_file(tmp_path / "0.png", png_bytes(photo))
    expected = to_canvas(np.repeat(canny(fit(photo, (512, 512)))[..., None], 3, 2), "canny", (64, 64))
    mine = samples_of(tmp_path, config).condition(0, 0, False)
    # Cut before it is scaled, or after: the rounding differs by a pixel of 512 at most.
    assert (mine != expected).mean() < 0.02 and 0.01 < (mine == 255).mean() < 0.5


# What a run does


def test_only_the_controlnet_moves_and_files_are_whole(data, config, tmp_path):
    base = load_base(config.base)
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    hashes = folder_hash(base.folder)
    progress = train(find_pairs(data), config, tmp_path / "run", CPU)
    assert progress.step == 6
    assert all(torch.equal(v, before[k]) for k, v in load_base(config.base).unet.state_dict().items())
    assert folder_hash(base.folder) == hashes
    rows = log_of(tmp_path / "run")
    assert [r["step"] for r in rows if "control_gap" in r] == [0, 3, 6]
    assert next(r for r in rows if r["step"] == 0)["control_gap"] == 0.0
    assert rows[-1]["control_gap"] != 0.0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "README.md", "checkpoints", "config.json", "config.toml", "curve.png", "diffusion_pytorch_model.safetensors",
        "log.jsonl", "pictures", "run.json", "samples.png",
    }  # fmt: skip
    ours = load_controlnet(tmp_path / "run", base=base.unet.config)
    theirs = ControlNetModel.from_pretrained(tmp_path / "run")
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert any(p.abs().max() > 0 for p in ours.controlnet_down_blocks.parameters())
    assert (
        "converged" in (tmp_path / "run/README.md").read_text()
        or "overdue" in (tmp_path / "run/README.md").read_text()
        or "waiting" in (tmp_path / "run/README.md").read_text()
    )


def test_the_base_in_training_is_locked(data, config, tmp_path, monkeypatch):
    """The very tensors of the base that training runs on are unchanged, bit for bit."""
    import controlnet.model.training.run as module

    loaded = []
    monkeypatch.setattr(module, "load_base", lambda *a: loaded.append(load_base(*a)) or loaded[-1])
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
    ],
)  # fmt: skip
def test_ways_that_give_the_same_losses(data, config, tmp_path, change):
    found = find_pairs(data)
    train(found, config, tmp_path / "plain", CPU)
    train(found, replace(config, **change), tmp_path / "other", CPU)
    plain, other = (np.array([loss for _, loss in losses(tmp_path / n)]) for n in ("plain", "other"))
    assert np.allclose(plain, other, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"copy": "lite"}, {"convolutions": "gaussian"}, {"hint": "paper"}, {"precision": "bfloat16"},
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


def test_it_learns_the_condition(data, config, tmp_path):
    """On one colour-coded task the gap leaves its noise band: control is learned and the verdict says so."""
    shutil.copytree(data, tmp_path / "data/images")
    shutil.copytree(data, tmp_path / "data/conditions")
    config = replace(config, kind="copy", max_steps=60, learning_rate=5e-3, validate_every=10, prompt_dropout=1.0)
    train(find_pairs(tmp_path / "data"), config, tmp_path / "run", CPU)
    rows = [r for r in log_of(tmp_path / "run") if "control_gap" in r]
    assert rows[-1]["control_gap"] > 0 and rows[-1]["validation_loss"] < rows[0]["validation_loss"]


# The command line


def test_two_words_are_enough_and_status_tells(data, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLNET_BASE", config.base)
    sets = [f"--set={key}={value}" for key, value in
            {"max_steps": 4, "batch_size": 2, "validate_every": 2, "held_out": 2}.items()]  # fmt: skip
    assert run("train", data, *sets) == 0
    out, err = capsys.readouterr()
    assert out == "runs/photos-1\n"
    assert "kind canny (made from the photos by our detector)" in err and "4 steps" in err
    assert run("status", "runs/photos-1") == 0
    assert "step 4 of 4" in capsys.readouterr().out
    assert run("status", "runs/photos-1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == 4 and told["verdict"] in ("overdue", "converged") and told["band"] >= 0

    assert run("train", data, "--resume", "--set", "max_steps=6") == 0
    assert "goes on at step 4" in capsys.readouterr().err
    assert run("train", data, "--resume", "--set", "learning_rate=0.5") == Exit.USAGE
    assert "learning_rate was 1e-05, is 0.5" in capsys.readouterr().err
    assert run("train", data, *sets) == 0
    assert capsys.readouterr().out == "runs/photos-2\n"

    shutil.copytree(data, tmp_path / "more")
    (tmp_path / "more/0.png").unlink()
    assert run("train", tmp_path / "more", "--resume", "-o", "runs/photos-1") == Exit.USAGE
    assert "the data changed: 12 pairs then, 11 now" in capsys.readouterr().err

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


@pytest.mark.parametrize(
    "text, told",
    [
        ("max_step=3", "--set max_steps="), ("learning_rte=1", "--set learning_rate="),
        ("batch_size=2.5", "whole number"), ("flip=maybe", "true or false"), ("max_steps", "expected key=value"),
        ("learning_rate=-1", "above 0"),
        ("precision=int8", "one of float32"), ("prompt_dropout=2", "from 0 to 1"), ("size=500", "multiple of 8"),
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
    with pytest.raises(UsageError, match="flip=true with kind 'pose'"):
        train(find_pairs(data), replace(config, kind="pose", flip=True), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_a_base_that_does_not_fit_is_refused(data, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", data, "--base", "nowhere") == Exit.USAGE
    assert "unknown base 'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_memory_that_runs_out_says_what_halves_it(data, config, tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("controlnet.model.training.run.control_losses", full)
    with pytest.raises(TrainingError, match="out of memory with batch_size=4") as error:
        train(find_pairs(data), config, tmp_path / "run", CPU)
    assert "--set batch_size=2 --set accumulation=2" in error.value.hint


def test_an_explosion_keeps_the_good_state(data, config, tmp_path):
    config = replace(config, max_steps=40, learning_rate=1e9, clip_norm=1e9, save_every=1e-9)
    with pytest.raises(TrainingError, match="checkpoints before are kept") as error:
        train(find_pairs(data), config, tmp_path / "run", CPU)
    assert "learning_rate=" in error.value.hint
    state = Checkpoints(tmp_path / "run/checkpoints").load()
    assert state is None or all(p.isfinite().all() for p in state["parameters"])


# Survival


def start(data, config, folder, *more):
    settings = {"max_steps": 30, "batch_size": 2, "validate_every": 10, "held_out": 2, "pictures": 0,
                "save_every": 1e-9, "log_every": 1, "learning_rate": 1e-3, "warmup_steps": 0}  # fmt: skip
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    command = [
        sys.executable,
        "-m",
        "controlnet.cli.main",
        "train",
        str(data),
        "--base",
        config.base,
        "-o",
        str(folder),
    ]
    return subprocess.Popen([*command, *sets, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(data, config, tmp_path):
    """Three times; TORTURE=20 (`make torture`) for more. Every step writes a checkpoint, so kills fall into writing."""
    kills = int(os.environ.get("TORTURE", 3))
    chance = random.Random(0)
    whole = start(data, config, tmp_path / "whole")
    assert whole.wait(200) == 0, whole.stderr.read()
    folder = tmp_path / "cut"
    resume = ()
    for step in (1 + 24 * i // kills for i in range(kills)):
        process = start(data, config, folder, *resume)
        wait_for(lambda step=step: (Checkpoints(folder / "checkpoints").steps() or [0])[-1] >= step, process)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        resume = ("--resume",)
    process = start(data, config, folder, "--resume")
    assert process.wait(200) == 0
    for finished in (whole, process):
        finished.communicate()
    assert losses(tmp_path / "whole") == losses(folder)
    a, b = (Checkpoints(tmp_path / n / "checkpoints").load() for n in ("whole", "cut"))
    assert all(torch.equal(x, y) for k in ("parameters", "ema") for x, y in zip(a[k], b[k], strict=True))


def test_two_processes_train_as_one(data, config, tmp_path):
    for name, more in (("one", ()), ("two", ("--processes", "2"))):
        process = start(data, config, tmp_path / name, "--set", "max_steps=6", *more)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    one, two = (np.array([loss for _, loss in losses(tmp_path / n)]) for n in ("one", "two"))
    assert len(one) == 6 and np.allclose(one, two, rtol=1e-5)


def test_sigterm_saves_and_says_how_to_go_on(data, config, tmp_path):
    folder = tmp_path / "run"
    process = start(data, config, folder, "--set", "max_steps=100000", "--set", "save_every=1e9")
    wait_for(lambda: (folder / "log.jsonl").is_file() and len(losses(folder)) >= 5, process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == Exit.INTERRUPTED
    (step,) = Checkpoints(folder / "checkpoints").steps()
    assert step >= 5 and f"stopped at step {step}, saved" in err and f"--resume -o {folder}" in err


def test_a_full_disk_leaves_the_last_good_state(data, config, tmp_path, monkeypatch):
    found = find_pairs(data)
    train(found, replace(config, max_steps=3), tmp_path / "run", CPU)
    before = {p: p.read_bytes() for p in (tmp_path / "run/checkpoints").iterdir()}

    def full(obj, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OutputError, match="No space left on device") as error:
        train(found, config, tmp_path / "run", CPU, resume=True)
    assert "--resume" in error.value.hint
    assert {p: p.read_bytes() for p in (tmp_path / "run/checkpoints").iterdir()} == before


def test_an_output_that_cannot_be_written_is_refused_first(data, config, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run("train", data, "--base", config.base, "-o", tmp_path / "file/run") == Exit.OUTPUT
    assert "cannot be written" in capsys.readouterr().err


def test_tensorboard_is_asked_for_by_name(data, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="not installed"):
        train(find_pairs(data), replace(config, tensorboard=True), tmp_path / "run", CPU)


def test_the_world_as_photos(tmp_path, monkeypatch):
    from controlnet.model.tiny import dataset
    from controlnet.model.tiny.render import render
    from controlnet.model.tiny.scenes import make_scene

    scenes = [make_scene(i) for i in range(3)]
    drawn = render(scenes, 32)
    made = dataset.World(drawn.images.numpy(), *[np.zeros(3)] * 3, [s.caption for s in scenes])
    monkeypatch.setattr(dataset, "world", lambda *a, **k: made)
    found = find_pairs(dataset.world_photos(tmp_path / "world", 3, 32))
    assert [p.caption for p in found.pairs] == made.captions
    assert np.array_equal(read_image(found.pairs[1].image.read_bytes(), "")[0], made.images[1])
