"""Depth maps: near is white, their scale is told, and a network of transformers makes them."""

import numpy as np
import pytest
import torch
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.data.mirror import flip_condition
from controlnet.preprocessors.detectors.depth import (
    DepthOptions,
    NormalOptions,
    midas_depth,
    tiny_depth,
    to_map,
    to_normals,
    transformer_depth,
)
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.metadata import load
from controlnet.preprocessors.weights import SHIPPED
from helpers import run
from hypothesis import given, settings
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


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_normals_of_a_plane(right, down):
    """A plane that comes nearer to the right faces left (red), one that comes nearer downwards faces up (green)."""
    y, x = np.mgrid[0:40, 0:60] / 40
    normals = to_normals(right * x + down * y, NormalOptions(strength=np.ptp(right * x + down * y)))
    expected = np.array([right, down, 1]) / np.sqrt(right**2 + down**2 + 1)
    assert normals.shape == (40, 60, 3)
    assert np.abs(normals[1:-1, 1:-1] - (expected + 1) * 127.5).max() < 1 if np.hypot(right, down) > 1e-3 else True


@given(hnp.arrays(np.float32, (6, 9), elements=st.floats(0, 1, width=32)))
def test_a_mirrored_relief_has_mirrored_normals(nearness):
    mine, mirrored = (to_normals(n, NormalOptions()) for n in (nearness, nearness[:, ::-1]))
    flipped = flip_condition(Condition(mine, "normal")).map
    assert np.abs(flipped.astype(int) - mirrored).max() <= 1


def test_normals_of_nothing_face_the_viewer():
    assert (to_normals(np.full((5, 6), 3.0), NormalOptions()) == (128, 128, 255)).all()


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
    mine, _ = transformer_depth(photo, DepthOptions(), folder, On("cpu", "float32"))
    assert mine.shape == photo.shape[:2] and np.ptp(mine) == 255
    assert np.abs(mine - expected).mean() < 3 and np.corrcoef(mine.ravel(), expected.ravel())[0, 1] > 0.99
    raw = DepthOptions(raw=True)
    half, whole = (transformer_depth(photo, raw, folder, On("cpu", dtype))[0] for dtype in ("bfloat16", "float32"))
    assert np.corrcoef(half.ravel(), whole.ravel())[0, 1] > 0.98
    assert len(np.unique(half)) > 0.5 * len(np.unique(whole))  # its last layers are float32: no steps show


def test_the_command_writes_sixteen_bits(photo, folder, tmp_path):
    write_file(tmp_path / "a.png", png_bytes(photo))
    assert run("detect", "depth", tmp_path / "a.png", "--detector", "depth-anything-v2-small",
               "--weights", folder, "--size", "64", "--raw",
               "--preview", tmp_path / "sheet.png") == 0  # fmt: skip
    assert (tmp_path / "sheet.png").is_file()
    with Image.open(tmp_path / "a.depth.png") as made:
        assert made.mode.startswith("I") and np.asarray(made).max() == 65535
        assert load(made.text)["normalisation"]["white"] > load(made.text)["normalisation"]["black"]


def test_a_folder_of_something_else_is_refused(photo, tmp_path, capsys):
    write_file(tmp_path / "a.png", png_bytes(photo))
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    anything = ("detect", "depth", tmp_path / "a.png", "--detector", "depth-anything-v2-small")
    assert run(*anything, "--weights", tmp_path) == Exit.MODEL
    assert "holds no network of AutoModelForDepthEstimation" in capsys.readouterr().err
    assert run("detect", "depth", tmp_path / "a.png", "--weights", tmp_path) == Exit.MODEL
    assert "does not hold tiny-depth" in capsys.readouterr().err
    assert run(*anything, "--offline") == Exit.MODEL
    assert "the weights depth-anything-v2-small are not on this machine" in capsys.readouterr().err


def test_zoe_gives_metres_and_near_is_white(photo, tmp_path):
    """ZoeDepth with random weights; transformers' own pipeline as the reference."""
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation, ZoeDepthImageProcessor, pipeline

    torch.manual_seed(0)
    backbone = BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
        use_relative_position_bias=True,
    )  # fmt: skip
    config = ZoeDepthConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, bottleneck_features=8,
        num_relative_features=4, bin_embedding_dim=8, num_attractors=[4, 4, 4, 4], reassemble_factors=[4, 2, 1, 0.5],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.5, "max_depth": 10.0, "name": "indoor"}],
    )  # fmt: skip
    ZoeDepthForDepthEstimation(config).save_pretrained(tmp_path)
    ZoeDepthImageProcessor(size={"height": 64, "width": 64}, ensure_multiple_of=16).save_pretrained(tmp_path)
    told = pipeline("depth-estimation", model=str(tmp_path), device="cpu")(Image.fromarray(photo))["predicted_depth"]
    mine, fields = transformer_depth(photo, DepthOptions(raw=True), tmp_path)
    assert mine.shape == photo.shape[:2] and told.shape == mine.shape
    assert fields["normalisation"]["white"] == pytest.approx(1 / float(told.min()), rel=1e-4)
    assert mine.flat[int(told.argmin())] == 65535 and mine.flat[int(told.argmax())] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_midas_is_controlnet_auxs(photo, tmp_path):
    """DPT-Hybrid at its full size with random weights, beside controlnet-aux's own detector."""
    from controlnet_aux import MidasDetector
    from controlnet_aux.midas.midas.dpt_depth import DPTDepthModel

    torch.manual_seed(0)
    network = DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True)
    torch.save(network.state_dict(), tmp_path / "dpt_hybrid-midas-501f0c75.pt")
    square = np.ascontiguousarray(np.asarray(Image.fromarray(photo).resize((384, 384))))
    theirs = MidasDetector.from_pretrained(str(tmp_path))(square, detect_resolution=384, image_resolution=384)
    mine, _ = midas_depth(square, DepthOptions(), tmp_path, On("cpu", "float32"))
    assert np.ptp(mine) == 255 and np.abs(mine.astype(int) - np.asarray(theirs)[..., 0]).max() <= 1
    half, _ = midas_depth(square, DepthOptions(), tmp_path, On("cpu", "bfloat16"))
    assert np.abs(half.astype(int) - mine).mean() < 4


def test_the_embedded_network_sees_a_room(tmp_path):
    """A drawn room, never trained on, through the command, without any network: near is white, and in order."""
    from controlnet.model.tiny.world.rooms import draw_rooms
    from controlnet.preprocessors.agreement import rank_correlation

    images, depth = draw_rooms([20_000_003, 20_000_004, 20_000_005], 128)
    found = []
    for i, (image, true) in enumerate(zip(images.numpy(), depth.numpy(), strict=True)):
        write_file(tmp_path / f"{i}.png", png_bytes(image))
        assert run("detect", "depth", tmp_path / f"{i}.png", "--size", "128", "--offline") == 0
        with Image.open(tmp_path / f"{i}.depth.png") as made:
            assert made.mode == "L"
            found.append(rank_correlation(np.asarray(made), -true))
    assert np.mean(found) > 0.7, found


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=8, deadline=None)
def test_any_size_of_picture_has_a_depth(height, width):
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    mine, fields = tiny_depth(image, DepthOptions(), SHIPPED / "tiny-depth")
    assert mine.shape == (height, width) and np.isfinite(list(fields["normalisation"].values())).all()


def test_the_embedded_network_is_small():
    assert (SHIPPED / "tiny-depth" / "model.safetensors").stat().st_size < 8 * 2**20
