"""DWPose and MoGe-2 with small ONNX networks of the real inputs and outputs, through the real loading code."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from controlnet.preprocessors.detectors import dwpose, moge
from controlnet.preprocessors.detectors.registry import find_detector
from controlnet.preprocessors.errors import ModelError, NothingFoundError, UsageError
from controlnet.preprocessors.skeleton import HAND, WHOLE, mirror
from helpers import run
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WIDTH, HEIGHT = 320, 200
RATIO = 640 / WIDTH


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (5, 8, 3), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def network(path: Path, nodes, inputs, outputs, constants=None):
    """A file of an ONNX graph; inputs and outputs are name -> (type, shape)."""
    make = onnx.helper
    values = [[make.make_tensor_value_info(name, *what) for name, what in part.items()] for part in (inputs, outputs)]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph = make.make_graph(nodes, "g", *values, held)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=10), path)


FLOAT, INT = 1, 7


def answering(path: Path, name: str, shape, answers: dict[str, np.ndarray]):
    """A network of one input that gives these numbers whatever it is shown, and its mean times nothing."""
    make = onnx.helper.make_node
    nodes = [make("ReduceMean", [name], ["mean"], keepdims=0), make("Mul", ["mean", "zero"], ["nothing"])]
    nodes += [make("Add", [f"own_{key}", "nothing"], [key]) for key in answers]
    constants = {f"own_{key}": value.astype(np.float32) for key, value in answers.items()}
    network(path, nodes, {name: (FLOAT, shape)}, {key: (FLOAT, list(value.shape)) for key, value in answers.items()},
            constants | {"zero": np.zeros((), np.float32)})  # fmt: skip


def seen(boxes: list[tuple[tuple[float, float, float, float], float]]) -> np.ndarray:
    """YOLOX's output (1, 8400, 85) that says these boxes (left, top, right, bottom in the photo) and how sure it is."""
    out = np.zeros((1, 8400, 85))
    for i, (box, sure) in enumerate(boxes):
        left, top, right, bottom = (side * RATIO for side in box)
        column, row = 3 + i, 5
        place = 80 * 80 + row * 40 + column  # a cell of the second grid, whose side is 16
        out[0, place, :2] = (left + right) / 2 / 16 - column, (top + bottom) / 2 / 16 - row
        out[0, place, 2:4] = np.log((right - left) / 16), np.log((bottom - top) / 16)
        out[0, place, 4:6] = sure, 1.0
    return out


def points(at: np.ndarray, sure: np.ndarray) -> dict[str, np.ndarray]:
    """What the pose network says for 133 points at these places of the 288 x 384 pixels that it sees."""
    across, down = np.zeros((1, 133, 576)), np.zeros((1, 133, 768))
    across[0, np.arange(133), (at[:, 0] * 2).astype(int)] = sure
    down[0, np.arange(133), (at[:, 1] * 2).astype(int)] = sure
    return {"simcc_x": across, "simcc_y": down}


BOX = (100.0, 20.0, 180.0, 180.0)
"""A person of half the network's aspect: 80 x 160."""


@pytest.fixture
def weights(tmp_path):
    rng = np.random.default_rng(1)
    at, sure = rng.uniform(20, 260, (133, 2)).round(), np.full(133, 0.9)
    sure[[7, 95]] = 0.1  # the left elbow, and a point of the left hand
    folder = tmp_path / "dwpose"
    answering(folder / dwpose.FINDER, "images", [1, 3, 640, 640], {"output": seen([(BOX, 0.9), (BOX, 0.6)])})
    answering(folder / dwpose.POSE, "input", [1, 3, 384, 288], points(at, sure))
    return folder, at


def test_people_their_hands_and_faces_are_where_they_are(photo, weights):
    folder, at = weights
    map_, found = dwpose.dwpose(photo, dwpose.DWPoseOptions(hands=True, face=True), folder)
    (person,) = np.array(found["keypoints"])  # two boxes of one person
    # The network sees 1.25 times the box, in its own aspect: 150 x 200 pixels around (140, 100).
    expected = (at - (144, 192)) * (150 / 288) + (140, 100)
    assert person.shape == (WHOLE, 3) and map_.shape == photo.shape
    pixels = person[:, :2] * (WIDTH, HEIGHT)
    assert np.abs(pixels[0] - expected[0]).max() < 0.01 and np.abs(pixels[7] - expected[9]).max() < 0.01
    assert (person[6] == 0).all()  # the left elbow
    assert np.abs(pixels[1] - expected[[5, 6]].mean(0)).max() < 0.01  # the neck
    assert np.abs(pixels[18] - expected[91]).max() < 0.01 and (person[18 + 4] == 0).all()
    assert np.abs(pixels[18 + HAND] - expected[112]).max() < 0.01
    assert np.abs(pixels[18 + 2 * HAND + 67] - expected[90]).max() < 0.01 and not person[-2:].any()
    _, plain = dwpose.dwpose(photo, dwpose.DWPoseOptions(), folder)
    assert np.allclose(plain["keypoints"][0], person[:18])
    twice = mirror(mirror([person]))[0]
    assert np.allclose(twice, person) and np.allclose(
        mirror([person])[0][18], person[18 + HAND] * (-1, 1, 1) + (1, 0, 0)
    )


def test_the_networks_see_what_they_were_trained_on(photo, weights, monkeypatch):
    """YOLOX: BGR from 0 to 255, grey beyond the photo. The pose network: RGB, normalised."""
    folder, _ = weights
    shown = {}
    real = dwpose.onnx.run
    monkeypatch.setattr(dwpose.onnx, "run", lambda net, out, **given: shown.update(given) or real(net, out, **given))
    dwpose.dwpose(photo, dwpose.DWPoseOptions(), folder)
    images = shown["images"][0].transpose(1, 2, 0)
    large = cv2.resize(photo, (640, 400), interpolation=cv2.INTER_LINEAR)
    assert (images[400:] == 114).all() and (images[:400] == large[..., ::-1]).all()
    part = photo[:, 65:215].mean((0, 1))
    middle = shown["input"][0].transpose(1, 2, 0) * dwpose.SPREAD + dwpose.MEAN
    assert np.abs(middle.mean((0, 1)) - part).max() < 1


def test_nobody_and_files_of_something_else(photo, weights, tmp_path):
    folder, _ = weights
    with pytest.raises(NothingFoundError):
        dwpose.dwpose(photo, dwpose.DWPoseOptions(confidence=0.95), folder)
    map_, found = dwpose.dwpose(photo, dwpose.DWPoseOptions(confidence=0.95, allow_empty=True), folder)
    assert not map_.any() and found == {"keypoints": []}
    other = tmp_path / "other"
    answering(other / dwpose.FINDER, "pictures", [1, 3, 640, 640], {"output": np.zeros((1, 8400, 85))})
    with pytest.raises(ModelError, match="another network, of pictures to output; dwpose is of images to output"):
        dwpose.dwpose(photo, dwpose.DWPoseOptions(), other)
    (other / dwpose.FINDER).write_bytes(b"nothing")
    dwpose.onnx.load.cache_clear()
    with pytest.raises(ModelError, match="is no ONNX network"):
        dwpose.dwpose(photo, dwpose.DWPoseOptions(), other)
    answering(other / dwpose.FINDER, "images", [1, 3, 320, 320], {"output": np.zeros((1, 8400, 85))})
    dwpose.onnx.load.cache_clear()
    (other / dwpose.POSE).write_bytes((folder / dwpose.POSE).read_bytes())
    with pytest.raises(ModelError, match="the ONNX network fails"):
        dwpose.dwpose(photo, dwpose.DWPoseOptions(), other)


def test_the_command_writes_hands_and_faces_and_draws_them_again(photo, weights, tmp_path):
    folder, _ = weights
    Image.fromarray(photo).save(tmp_path / "a.png")
    command = ("detect", "pose", tmp_path / "a.png", "--size", "320x200", "--detector", "dwpose", "--weights", folder)
    assert run(*command, "--hands", "--face", "--keypoints", tmp_path / "k.json") == 0
    (person,) = json.loads((tmp_path / "k.json").read_text())["people"]
    assert {key: len(value) for key, value in person.items()} == {
        "pose_keypoints_2d": 54, "hand_left_keypoints_2d": 63, "hand_right_keypoints_2d": 63, "face_keypoints_2d": 210,
    }  # fmt: skip
    assert run("detect", "pose", tmp_path / "k.json", "--size", "320x200", "-o", tmp_path / "b.png") == 0
    first, again = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.pose.png", "b.png"))
    assert np.abs(first - again).mean() < 0.1 and (first == 255).all(2).any()


def test_what_is_missing_is_one_line_with_the_command(monkeypatch):
    row = find_detector("pose", "dwpose")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pose/dwpose needs onnxruntime") as error:
        row.ready(row.load_options()())
    assert error.value.hint == "pip install 'controlnet-toolkit[onnx]'"


def test_normals_face_as_they_do_elsewhere(photo, tmp_path):
    """A network that takes colours for directions, in its own axes: x right, y down, z away."""
    make = onnx.helper.make_node
    nodes = [
        make("Cast", ["num_tokens"], ["count"], to=FLOAT), make("Mul", ["count", "zero"], ["nothing"]),
        make("Mul", ["image", "two"], ["double"]), make("Sub", ["double", "one"], ["signed"]),
        make("Add", ["signed", "nothing"], ["sum"]), make("Transpose", ["sum"], ["normal"], perm=[0, 2, 3, 1]),
        make("Identity", ["normal"], ["points"]),
    ]  # fmt: skip
    size = [1, 3, "height", "width"]
    out = {name: (FLOAT, [1, "height", "width", 3]) for name in ("points", "normal")}
    constants = {name: np.array(value, np.float32) for name, value in (("zero", 0), ("one", 1), ("two", 2))}
    network(tmp_path / moge.FILE, nodes, {"image": (FLOAT, size), "num_tokens": (INT, [])}, out, constants)
    made = moge.normal(photo, moge.MogeOptions(), tmp_path)
    expected = -(photo / 127.5 - 1)
    expected /= np.linalg.norm(expected, axis=2, keepdims=True)
    assert np.abs(made - (expected + 1) * 127.5).max() <= 1
    # A wall seen from the front, in the network's axes (0, 0, -1), is blue, as `depth` paints it.
    wall = np.full_like(photo, 128)
    wall[..., 2] = 0
    assert np.abs(moge.normal(wall, moge.MogeOptions(), tmp_path).astype(int) - (128, 128, 255)).max() <= 2
    with pytest.raises(UsageError):
        moge.MogeOptions(tokens=10)
