"""The embedded model as shipped: small, whole, readable by other programs, and under control."""

import copy
import json

import numpy as np
import pytest
import torch
from controlnet.model.control.strength import Strength
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.registry import TINY, KnownBase
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.tiny.readers import pose_of, user_canny, user_depth
from controlnet.model.tiny.recipe import make_vae
from controlnet.model.tiny.stages import cached_latents, end_if_stopped, mark_of
from controlnet.model.tiny.train import limits, parse_stages
from controlnet.model.tiny.world.render import render
from controlnet.model.tiny.world.scenes import make_scene
from controlnet.model.tiny.world.shards import HELD_OUT
from controlnet.model.training.objective import Batch, NoiseSchedule, control_gap, control_losses
from controlnet.preprocessors.agreement import edge_f1
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

MIB = 2**20
SIZE = 8 * json.loads((TINY / "unet" / "config.json").read_text())["sample_size"]


def test_size_and_type_of_the_files():
    weights = list(TINY.rglob("*.safetensors"))
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) < 64 * MIB
    assert max(p.stat().st_size for p in weights) < 15 * MIB
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"F16"}, path  # noqa: SIM118


def test_the_card_is_whole():
    card = json.loads((TINY / "card.json").read_text())
    told = (TINY / "README.md").read_text()
    assert card["scenes"] >= 200 and set(card["control"]) == {"canny", "pose", "depth"}
    for found in card["control"].values():
        t, s, c = (found[k][0] for k in "TSC")
        assert found["control"] == pytest.approx((t - s) / (c - s), abs=2e-3)
        assert f"**(T - S) / (C - S) = {found['control']:.2f}**" in told
    training = json.loads((TINY / "training.json").read_text())
    for name, stage in training["stages"].items():
        assert stage["scenes"] >= 10_000 and f"| {name} | {stage['scenes']:,} | {stage['steps']:,} |" in told


def test_twelve_skips_and_the_layout_of_stable_diffusion():
    net = load_controlnet(TINY / "controlnet-canny")
    assert len(net.controlnet_down_blocks) == 12
    index = json.loads((TINY / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_diffusers_runs_it_and_gives_the_same_picture():
    """Our float32 images against diffusers' own pipeline on the same folders, within one level."""
    scene = make_scene(HELD_OUT + 1)
    condition = user_canny(render([scene], SIZE).images[0].numpy())
    base = load_base("tiny")
    net = load_controlnet(TINY / "controlnet-canny", torch.float32)
    ours = next(
        generate(base, [Request(scene.caption, 3, (condition,))], [(net, Strength(control_on="both"))], steps=4)
    )
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        TINY, controlnet=ControlNetModel.from_pretrained(TINY / "controlnet-canny"), safety_checker=None
    ).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        scene.caption, image=condition_tensor(condition)[None], num_inference_steps=4, guidance_scale=base.guidance,
        generator=torch.Generator().manual_seed(3), height=SIZE, width=SIZE, output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(ours.astype(int) - np.rint(theirs * 255)).max() <= 1


def test_control_acts_on_the_half_that_reads_the_prompt_unless_one_says_otherwise():
    """The base's own way, in Python and in the command; a mode by name is that mode."""
    condition = user_canny(render([make_scene(HELD_OUT)], SIZE).images[0].numpy())
    base, net = load_base("tiny"), load_controlnet(TINY / "controlnet-canny", torch.float32)
    own, cond, both = (
        next(generate(base, [Request("a red cube", 0, (condition,))], [(net, Strength(control_on=halves))], steps=3))
        for halves in (None, "cond", "both")
    )
    assert (own == cond).all() and np.abs(own.astype(int) - both).max() > 20
    assert KnownBase("", "", "").control_on == "both"  # of every base that says nothing


def test_its_images_follow_their_edges():
    """On eight held-out scenes the edges found again fit the given condition better than a neighbour's."""
    scenes = [make_scene(HELD_OUT + i) for i in range(8)]
    conditions = [user_canny(image) for image in render(scenes, SIZE).images.numpy()]
    base, net = load_base("tiny"), load_controlnet(TINY / "controlnet-canny", torch.float32)
    true, other = [], []
    for i, scene in enumerate(scenes):
        image = next(generate(base, [Request(scene.caption, i, (conditions[i],))], [(net, Strength())], steps=8))
        found = user_canny(image)[..., 0]
        true.append(edge_f1(found, conditions[i][..., 0], SIZE // 128))
        other.append(edge_f1(found, conditions[i - 1][..., 0], SIZE // 128))
    assert np.mean(true) > np.mean(other) + 0.15, (np.mean(true), np.mean(other))


@pytest.mark.parametrize("kind", ["canny", "pose", "depth"])
def test_each_kind_is_loaded_alone_and_heeded(kind):
    """On twelve held-out people the base does better with their own condition than with a neighbour's."""
    base, net = load_base("tiny"), load_controlnet(TINY / f"controlnet-{kind}", torch.float32)
    scenes = [s for s in map(make_scene, range(HELD_OUT, HELD_OUT + 80)) if s.sort == "person"][:12]
    drawn = render(scenes, SIZE)
    make = {"canny": user_canny, "depth": user_depth}.get(kind)
    pictures, joints = drawn.images.numpy(), drawn.joints.numpy()
    maps = [make(picture) if make else pose_of(j, SIZE) for picture, j in zip(pictures, joints, strict=True)]
    conditions = torch.stack([condition_tensor(m) for m in maps])
    with torch.no_grad():
        z0 = base.vae.encode(drawn.images.permute(0, 3, 1, 2) / 127.5 - 1).latents * base.vae.config.scaling_factor
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(z0, eps, torch.full((12,), 500), base.encode_text([""] * 12), conditions)
    diffusion = NoiseSchedule(base.scheduler)
    found = control_gap(lambda b: control_losses(base.unet, net, diffusion, b), [(batch, conditions.roll(1, 0))])
    assert found["control_gap"] > found["band"] > 0, found


def test_minutes_of_the_stages():
    assert parse_stages("2") == dict.fromkeys(("vae", "text", "half", "base", "canny", "pose", "depth"), 2)
    assert parse_stages("base=5") == {
        "vae": 0, "text": 0, "half": 0, "base": 5, "canny": 0, "pose": 0, "depth": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="'bas'"):
        parse_stages("bas=5")
    assert limits("2", None)["half"] == {"minutes": 2} and limits("2", "text=5,pose=0") == {
        stage: {"max_steps": 5} if stage == "text" else {"minutes": 0.0} for stage in parse_stages("0")
    }


def test_a_word_in_capitals_is_read(small_base_folder):
    base = load_base(str(small_base_folder / "base"))
    a, b = (base.encode_text([text]).c_t for text in ("A Red CUBE", "a red cube"))
    assert torch.equal(a, b)
    assert base.unknown_words("a RED Zebra, zebra!") == ["zebra"]


def test_contact_sheet():
    from controlnet.preprocessors.sheet import contact_sheet

    red, grey = np.full((10, 20, 3), (255, 0, 0), np.uint8), np.full((8, 8), 99, np.uint8)
    sheet = contact_sheet([(red, "red"), (grey, "a long text " * 9), (red, "")], columns=2, cell=40)
    assert sheet.shape[1] == 2 * 48 + 8
    assert (sheet == (255, 0, 0)).all(-1).sum() == 2 * 40 * 20 and (sheet == 99).all(-1).sum() >= 40 * 40
    Image.fromarray(sheet)


@pytest.fixture
def four_scenes(monkeypatch):
    """The training sees four drawn scenes."""
    from controlnet.model.tiny import train
    from controlnet.model.tiny.world import shards as dataset

    scenes = [make_scene(i) for i in range(4)]
    drawn = render(scenes, SIZE)
    captions, joints = [s.caption for s in scenes], np.ones((4, 18, 3))
    made = dataset.World(*(a.numpy() for a in (drawn.images, drawn.depth, drawn.parts)), joints, captions)
    monkeypatch.setattr(train, "world", lambda *a, **k: made)
    return train


def test_the_vae_alone_is_taken_and_another_machine_goes_on(tmp_path, four_scenes):
    """With the record of its training, and of both machines."""
    out, start = tmp_path / "weights", ["--start", str(TINY), "--scenes", "40000"]
    four_scenes.main([*start, "--steps", "text=1", "--runs", str(tmp_path), "--out", str(out)])
    before, after = (load_file(f / "vae/diffusion_pytorch_model.safetensors") for f in (TINY, out))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    told, trained = (json.loads((folder / "training.json").read_text()) for folder in (out, TINY))
    assert told["stages"]["vae"] == trained["stages"]["vae"]
    assert told["stages"]["text"]["steps"] == trained["stages"]["text"]["steps"] + 1
    assert told["stages"]["text"]["scenes"] == 40_000
    assert told["machine"].startswith(f"{trained['machine']}, then ")


def test_a_model_with_a_part_that_was_never_trained_is_not_written(tmp_path, four_scenes, capsys):
    out = ["--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    for asked in (["--minutes", "base=120"], ["--start", str(TINY), "--keep", "vae,text,base,canny", "--minutes", "0"]):
        with pytest.raises(SystemExit):
            four_scenes.main([*asked, *out])
    told = capsys.readouterr().err
    assert "vae gets no minutes and no steps" in told and "pose gets no minutes" in told
    assert not (tmp_path / "out").exists()


def test_a_stage_that_was_stopped_ends_the_command(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 1, "ended": "finished"}\n')
    end_if_stopped(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 1, "ended": "stopped"}\n')
    with pytest.raises(SystemExit) as stopped:
        end_if_stopped(tmp_path)
    assert stopped.value.code == 130


def test_networks_of_other_weights_have_other_marks():
    torch.manual_seed(0)
    one, other = make_vae(8), make_vae(8)
    assert mark_of(one) == mark_of(copy.deepcopy(one)) != mark_of(other)


def test_training_goes_on_from_given_weights(tmp_path, four_scenes):
    """With no minutes, what comes out is what went in, and the minutes spent on it are still told."""
    train = four_scenes
    out = tmp_path / "weights"
    train.main(["--minutes", "0", "--runs", str(tmp_path / "runs"), "--start", str(TINY), "--out", str(out)])
    for before in sorted(TINY.rglob("*.safetensors")):
        after = load_file(out / before.relative_to(TINY))
        assert all(torch.equal(value, after[key]) for key, value in load_file(before).items()), before
    for name in ("training.json", "tokenizer/vocab.json", "tokenizer/words.txt"):
        assert (out / name).read_text() == (TINY / name).read_text()
    before, after = (json.loads((at / "scheduler/scheduler_config.json").read_text()) for at in (TINY, out))
    assert before | {"_diffusers_version": ""} == after | {"_diffusers_version": ""}  # of the library that wrote it


def test_latents_are_kept_with_the_factor_that_gives_them_unit_deviation(tmp_path):
    torch.manual_seed(0)
    vae, images = make_vae(8).eval(), np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    made = cached_latents(vae, images, tmp_path / "latents.pt", torch.device("cpu"))
    factor = vae.config.scaling_factor
    assert made.shape == (6, 8, 4, 4) and float(made.float().std()) == pytest.approx(1, abs=0.02) and factor != 1
    vae.register_to_config(scaling_factor=1.0)
    assert torch.equal(cached_latents(vae, images, tmp_path / "latents.pt", torch.device("cpu")), made)
    assert vae.config.scaling_factor == factor
