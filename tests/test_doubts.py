"""Conditions that look wrong are told, right ones are not."""

import cv2
import numpy as np
import pytest
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.detectors.hed import strokes
from controlnet.preprocessors.detectors.lineart import lineart
from controlnet.preprocessors.doubts import doubts
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.skeleton import cut_people, draw, mirror
from helpers import run
from test_skeleton import standing


def rgb(map_):
    return np.repeat(map_[..., None], 3, 2)


def what(condition, kind, size=None):
    return [doubt.what for doubt in doubts(condition, kind, size)]


@pytest.fixture
def lines(photo):
    return rgb(canny(photo))


def test_right_maps_raise_no_doubt(photo, lines):
    depth = rgb(np.linspace(0, 255, 96 * 128).reshape(96, 128).astype(np.uint8))
    soft = cv2.GaussianBlur(lines, (0, 0), 2)
    thick = rgb(strokes(cv2.dilate(lines[..., 0], np.ones((9, 9))), 2.0))
    for condition, kind in (
        (lines, "canny"), (soft, "softedge"), (rgb(lineart(photo)), "lineart"), (depth, "depth"), (thick, "scribble"),
        (255 - depth, "blueprint"),
    ):  # fmt: skip
        assert what(condition, kind, (128, 96)) == [], kind


@pytest.mark.parametrize("kind", ["canny", "softedge", "lineart"])
def test_inverted_lines(lines, kind):
    assert what(255 - lines, kind) == ["inverted lines"]


def test_flat_and_grey_and_stretched(lines):
    assert what(np.full((64, 64, 3), 7, np.uint8), "depth") == ["empty condition"]
    assert what(cv2.GaussianBlur(lines, (0, 0), 1.5) * 2, "canny") == ["grey lines"]
    assert what(lines, "canny", (96, 96)) == ["another aspect"]
    assert what(lines, "canny", (256, 192)) == []


@pytest.mark.parametrize("size", [(512, 512), (256, 256), (128, 128)])
@pytest.mark.parametrize("change", [lambda p: [p], lambda p: mirror([p]), lambda p: cut_people([p], 0.1, 0, 0.8, 1)])
def test_poses_with_red_and_blue_exchanged(size, change):
    pose = draw(change(standing()), size)
    assert what(pose, "pose") == [] and what(pose[..., ::-1], "pose") == ["red and blue exchanged"]
    assert what(pose[..., ::-1], "depth") == []


@pytest.mark.parametrize("change", [
    lambda m: m[::-1], np.rot90, lambda m: m[: len(m) // 2], lambda m: m[len(m) // 2 :],
    lambda m: np.concatenate([m, m[:, ::-1]], 1),
], ids=["upside down", "lying", "upper half", "lower half", "two people"])  # fmt: skip
def test_colours_are_judged_however_people_lie(change):
    pose = np.ascontiguousarray(change(draw([standing()], (512, 512))))
    assert what(pose, "pose") == [] and what(pose[..., ::-1], "pose") == ["red and blue exchanged"]


def test_what_is_no_skeleton_or_of_another_size(photo, lines):
    grey = rgb(draw([standing()], (256, 256)).max(2))
    assert what(photo, "pose") == what(grey, "pose") == ["no skeleton"]
    small = lines[::4, ::4]
    assert what(small, "canny", (128, 96)) == ["another size"] and what(small, "canny", (48, 36)) == []


def test_generate_warns_and_strict_refuses(tmp_path, small_base_folder, capsys, lines):
    write_file(tmp_path / "m.canny.png", png_bytes(255 - lines))
    cond = f"{tmp_path}/m.canny.png,net={small_base_folder}/net"
    base, out = small_base_folder / "base", tmp_path / "x.png"
    command = ("generate", "--base", base, "--cond", cond, "--prompt", "x", "--steps", "1", "-o", out)
    assert run(*command, "--strict") == Exit.INPUT
    err = capsys.readouterr().err
    assert "m.canny.png: mostly white" in err and "hint: invert" in err and not out.exists()
    assert run(*command) == 0
    assert "warning: " in (err := capsys.readouterr().err) and "mostly white" in err
