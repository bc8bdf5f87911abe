"""The record for other programs: A1111's `parameters`, in PNG, JPEG and WebP, read as these programs read it."""

import io
import json
import re

import numpy as np
import pytest
from controlnet.model.work.a1111 import parameters
from controlnet.preprocessors.errors import OutputError
from controlnet.preprocessors.images import picture_bytes, read_image
from controlnet.preprocessors.metadata import dump, load
from helpers import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

# From stable-diffusion-webui, modules/infotext_utils.py.
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def as_read(text):
    """(prompt, negative prompt, settings), as the web UI's parse_generation_parameters finds them."""
    *lines, last = text.strip().split("\n")
    if len(PARAMETER.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt, negative, inside = [], [], False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            inside, line = True, line[16:].strip()
        (negative if inside else prompt).append(line)
    settings = {k: json.loads(v) if v.startswith('"') else v for k, v in PARAMETER.findall(last)}
    return "\n".join(prompt), "\n".join(negative), settings


def record(**changes):
    detect = {"kind": "canny", "detector": "opencv", "options": {"low": 50, "high": 150}, "size": [512, 768]}
    entry = {
        "path": "a.png", "kind": "canny", "net": "sd15-canny", "net_sha256": "0123456789ab", "scale": 0.8, "start": 0.0,
        "end": 0.6, "weighting": "uniform", "detect": detect,
    }  # fmt: skip
    return {
        "prompt": "a red house", "negative": "blurred", "steps": 20, "scheduler": "dpm++2m_karras", "guidance": 7.5,
        "seed": 7, "size": [512, 768], "base": "sd15", "base_sha256": "fedcba9876543210", "vae_sha256": None,
        "conditions": [entry], "control_on": "both", "clip_skip": 1, "init": None, "strength": None,
        "hires_strength": None, "versions": {"controlnet": "0.2.0"},
    } | changes  # fmt: skip


def test_it_is_read_as_the_web_ui_reads_it():
    prompt, negative, settings = as_read(parameters(record()))
    assert (prompt, negative) == ("a red house", "blurred")
    unit = settings.pop("ControlNet 0")
    assert settings == {
        "Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "7",
        "Size": "512x768", "Model hash": "fedcba9876", "Model": "sd15", "Clip skip": "2", "Version": "controlnet 0.2.0",
    }  # fmt: skip
    assert dict(part.split(": ") for part in unit.split(", ")) == {
        "Module": "canny", "Model": "sd15-canny [01234567]", "Weight": "0.8", "Resize Mode": "Crop and Resize",
        "Processor Res": "512", "Threshold A": "50", "Threshold B": "150", "Guidance Start": "0", "Guidance End": "0.6",
        "Control Mode": "Balanced",
    }  # fmt: skip


@given(st.text(max_size=60), st.text(max_size=60), st.text(min_size=1, max_size=30))
def test_words_set_nothing(prompt, negative, base):
    """Whatever a prompt or a name holds, the settings are the record's."""
    found = as_read(parameters(record(prompt=prompt, negative=negative, base=base, conditions=[])))[2]
    assert found["Steps"] == "20" and found["Seed"] == "7" and found["Sampler"] == "DPM++ 2M"
    assert found.keys() <= as_read(parameters(record(conditions=[])))[2].keys()


@pytest.mark.parametrize(
    "prompt",
    [
        "a house\nNegative prompt: everything",
        "Negative prompt: everything",
        "a house\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 9",
        "Steps: 1, Sampler: Euler, Seed: 9, Size: 1x1",
    ],
)
def test_a_prompt_cannot_forge(prompt):
    read, negative, settings = as_read(parameters(record(prompt=prompt)))
    assert negative == "blurred" and settings["Steps"] == "20" and settings["Seed"] == "7"
    assert read and "\n" not in read


@pytest.mark.parametrize(
    ("changes", "setting", "value"),
    [
        ({"scheduler": "EulerAncestralDiscreteScheduler", "sampler": "euler_a"}, "Sampler", "Euler a"),
        ({"scheduler": "sde-dpm++"}, "Sampler", "DPM++ 2M SDE"),
        ({"init": "a.png", "strength": 0.6}, "Denoising strength", "0.6"),
        ({"base": "my, base: 2"}, "Model", "my, base: 2"),
    ],
)
def test_settings(changes, setting, value):
    assert as_read(parameters(record(**changes)))[2][setting] == value


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scale": "1@0/.3@.6"}, "Weight: 1,"),
        ({"scale": 1e-5}, "Weight: 1e-05,"),
        ({"scale": "-.5@0/1@.5"}, "Weight: -0.5,"),
        ({"detect": None}, "Module: none"),
        ({"weighting": "soft"}, "My prompt is more important"),
        ({"net": 'a, "b": c'}, "Model: a   b   c [01234567]"),
    ],
)
def test_units(changes, told):
    entry = record()["conditions"][0] | changes
    assert told in as_read(parameters(record(conditions=[entry])))[2]["ControlNet 0"]


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp"])
def test_every_type_carries_the_record(ending):
    own = record(prompt="ein Haus, 家 😀", negative="")
    image = np.random.default_rng(0).integers(0, 255, (8, 6, 3), np.uint8)
    image = np.asarray(Image.fromarray(image).resize((192, 256)))
    data = picture_bytes(image, {**dump(own), "parameters": parameters(own)}, ending)
    pixels, text = read_image(data, "it")
    assert load(text) == json.loads(json.dumps(own)) and text["parameters"] == parameters(own)
    assert pixels.shape == image.shape
    assert np.abs(pixels.astype(int) - image).mean() < (1 if ending == ".png" else 4)
    if ending != ".png":  # as other programs find it
        comment = Image.open(io.BytesIO(data)).getexif().get_ifd(0x8769)[0x9286]
        assert comment.startswith(b"UNICODE\0") and "家 😀" in comment[8:].decode("utf-16-be")


def test_generate_replay_and_score_know_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edges = np.zeros((128, 128), np.uint8)
    edges[30:90, 30] = edges[30:90, 90] = edges[30, 30:90] = edges[90, 30:90] = 255
    Image.fromarray(edges).save("box.canny.png")
    asked = ["--cond", "box.canny.png", "--prompt", "a red cube, blue wall", "--steps", "2", "--seed", "3"]
    assert run("generate", *asked, "-o", "made.jpg") == 0
    assert run("generate", *asked, "-o", "made.png") == 0
    assert run("replay", "made.jpg") == 0
    assert "identical" in capsys.readouterr().out
    assert run("replay", "made.jpg", "-o", "again.webp") == 0
    assert run("score", "made.jpg", "--json") == 0
    pictures = [read_image((tmp_path / f"made.{ending}").read_bytes(), "it")[0] for ending in ("jpg", "png")]
    assert 0 < np.abs(pictures[0].astype(int) - pictures[1]).mean() < 4
    assert (tmp_path / "again.webp").read_bytes()[8:12] == b"WEBP"


def test_another_type_is_refused(tmp_path, capsys):
    assert run("generate", "--prompt", "a", "-o", tmp_path / "a.bmp") == 2
    assert "PNG, JPEG or WebP" in capsys.readouterr().err
    assert run("detect", "canny", "photo.jpg", "-o", tmp_path / "a.jpg") == 2


@pytest.mark.parametrize(("letters", "kept"), [(5_000, {"controlnet", "parameters"}), (50_000, {"controlnet"})])
def test_a_long_record_in_a_jpeg(letters, kept):
    own = record(prompt="x" * letters, conditions=[])
    text = {**dump(own), "parameters": parameters(own)}
    found = read_image(picture_bytes(np.zeros((16, 16, 3), np.uint8), text, ".jpg"), "it")[1]
    assert found.keys() == kept and load(found)["prompt"] == own["prompt"]


def test_a_record_that_no_jpeg_holds():
    own = record(prompt="x" * 70_000, conditions=[])
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(OutputError, match="does not fit into a JPEG"):
        picture_bytes(image, dump(own), ".jpg")
    assert load(read_image(picture_bytes(image, dump(own), ".webp"), "it")[1])["prompt"] == own["prompt"]
