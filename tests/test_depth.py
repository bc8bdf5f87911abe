"""Depth maps: near is white, their scale is told, and a network of transformers makes them."""

import numpy as np
import pytest
import torch
from controlnet.preprocessors.depth import DepthOptions, depth_anything, to_map
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.images import png_bytes, write_file
from controlnet.preprocessors.metadata import load
from helpers import run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image


@given(hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e3, 1e3, width=32)), st.booleans())
def test_the_numbers_come_back_from_map_and_text(nearness, raw):
    map_, fields = to_map(nearness, DepthOptions(raw=raw))
    scale, top = fields["normalisation"], 65535 if raw else 255
    assert map_.dtype == (np.uint16 if raw else np.uint8)
    back = scale["black"] + map_ / top * (scale["white"] - scale["black"])
    assert np.abs(back - nearness).max() <= (scale["white"] - scale["black"]) / top + 1e-6
    if np.ptp(nearness) > 0:
        assert map_.flat[nearness.argmax()] == top and map_.flat[nearness.argmin()] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Depth Anything with random weights and one layer of each sort."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("depth")
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3
    ).save_pretrained(folder)
    return folder


def test_it_is_the_pipelines_depth(photo, folder):
    """transformers' own pipeline as the reference, in the levels of the map."""
    from transformers import pipeline

    told = pipeline("depth-estimation", model=str(folder), device="cpu")(Image.fromarray(photo))["predicted_depth"]
    told = told.squeeze().numpy()
    expected = (told - told.min()) / np.ptp(told) * 255
    mine, _ = depth_anything(photo, DepthOptions(), folder)
    assert mine.shape == photo.shape[:2] and np.ptp(mine) == 255
    assert np.abs(mine - expected).mean() < 3 and np.corrcoef(mine.ravel(), expected.ravel())[0, 1] > 0.99


def test_the_command_writes_sixteen_bits(photo, folder, tmp_path):
    write_file(tmp_path / "a.png", png_bytes(photo))
    assert run("detect", "depth", tmp_path / "a.png", "--weights", folder, "--size", "64", "--raw",
               "--preview", tmp_path / "sheet.png") == 0  # fmt: skip
    assert (tmp_path / "sheet.png").is_file()
    with Image.open(tmp_path / "a.depth.png") as made:
        assert made.mode.startswith("I") and np.asarray(made).max() == 65535
        assert load(made.text)["normalisation"]["white"] > load(made.text)["normalisation"]["black"]


def test_a_folder_of_something_else_is_refused(photo, tmp_path, capsys):
    write_file(tmp_path / "a.png", png_bytes(photo))
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert run("detect", "depth", tmp_path / "a.png", "--weights", tmp_path) == Exit.MODEL
    assert "holds no depth network" in capsys.readouterr().err
    assert run("detect", "depth", tmp_path / "a.png", "--offline") == Exit.MODEL
    assert "the weights depth-anything-v2-small are not on this machine" in capsys.readouterr().err
