"""Conditions that look wrong are told, right ones are not."""

import json

import cv2
import numpy as np
import pytest
from controlnet.preprocessors.condition import Condition, read_condition
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.detectors.depth import NormalOptions, to_normals
from controlnet.preprocessors.detectors.hed import strokes
from controlnet.preprocessors.detectors.lineart import lineart
from controlnet.preprocessors.doubts import doubts, doubts_of, mend
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.metadata import dump
from controlnet.preprocessors.palette import coloured
from controlnet.preprocessors.skeleton import cut_people, draw, mirror
from helpers import run
from hypothesis import given
from hypothesis import strategies as st
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
    assert "m.canny.png: mostly white" in err and "hint: controlnet check MAP --fix" in err and not out.exists()
    assert run(*command) == 0
    assert "warning: " in (err := capsys.readouterr().err) and "mostly white" in err


def mended(condition, kind, **fields):
    map_, done = mend(Condition(condition, kind, **fields))
    return map_, [doubt.what for doubt in done]


@pytest.fixture
def floor():
    """A depth map of a floor that recedes, with a box on it."""
    depth = np.tile(np.linspace(20, 240, 96).astype(np.uint8)[:, None], (1, 128))
    depth[40:70, 50:80] = 200
    return rgb(depth)


def test_depth_the_other_way_round_or_in_colours(floor):
    assert what(floor, "depth") == [] and what(255 - floor, "depth") == ["reversed depth"]
    assert (mended(255 - floor, "depth")[0] == floor).all()
    for name in ("VIRIDIS", "INFERNO", "TURBO", "JET"):
        shown = cv2.applyColorMap(floor[..., 0], getattr(cv2, f"COLORMAP_{name}"))[..., ::-1]
        assert what(shown, "depth") == ["coloured depth"]
        map_, done = mended(shown, "depth")
        assert done == ["coloured depth"] and np.abs(map_.astype(int) - floor).max() <= 2, name
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    assert what(photo, "depth") == ["coloured depth"] and mended(photo, "depth")[1] == []


def test_normals(floor):
    right = to_normals(floor[..., 0].astype(float), NormalOptions())
    assert what(right, "normal") == [] and what(right[..., ::-1], "normal") == ["red and blue exchanged"]
    map_, done = mended(np.ascontiguousarray(right[..., ::-1]), "normal")
    assert (map_ == right).all() and done == ["red and blue exchanged"]
    assert what(floor, "normal") == ["no normal map"] and what(right, "depth") != []


def test_classes(photo):
    right = coloured(
        cv2.resize(np.arange(12, dtype=np.uint8).reshape(3, 4), (128, 96), interpolation=cv2.INTER_NEAREST)
    )
    assert what(right, "seg") == [] and what(right[..., ::-1], "seg") == ["red and blue exchanged"]
    assert (mended(np.ascontiguousarray(right[..., ::-1]), "seg")[0] == right).all()
    blurred = cv2.GaussianBlur(right, (0, 0), 3)
    assert what(blurred, "seg") == what(photo, "seg") == ["colours beyond the palette"]
    map_, _ = mended(blurred, "seg")
    assert what(map_, "seg") == [] and (map_ == right).all(2).mean() > 0.7


def test_maps_of_maps_and_of_other_kinds(photo, lines):
    twice = rgb(canny(lines))
    assert what(lines, "canny") == [] and what(twice, "canny") == ["doubled lines"]
    assert what(photo, "canny") == ["no line map"] == what(photo, "softedge")
    record = {"kind": "canny", "source": "house.depth.png"}
    assert [d.what for d in doubts(lines, "canny", record=record)] == ["map of a map"]
    assert [d.what for d in doubts(lines, "canny", record={"kind": "canny", "source": "house.png"})] == []
    assert [d.what for d in doubts(lines, "tile", record=record)] == ["another kind"]
    assert [d.what for d in doubts(lines, "softedge", record={"kind": "canny"})] == []  # lines stand in for lines


def test_lines_on_nothing_are_lines_on_black(lines, tmp_path):
    alpha = lines[..., 0]
    write_file(tmp_path / "a.canny.png", png_bytes(np.dstack([lines, alpha])))
    condition = read_condition(str(tmp_path / "a.canny.png"))
    assert "transparency" in [doubt.what for doubt in doubts_of(condition)]
    map_, done = mend(condition)
    assert (map_ == lines).all() and done[0].what == "transparency"
    hiding = doubts_of(read_condition(str(tmp_path / "a.canny.png"), "inpaint"))  # there it says what is hidden
    assert "transparency" not in [doubt.what for doubt in hiding]


@given(
    fault=st.sampled_from(["none", "invert", "swap", "blur", "half"]),
    kind=st.sampled_from(["canny", "softedge", "pose", "depth", "normal", "seg", "tile"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_mending_ends_and_leaves_nothing_that_can_be_mended(fault, kind, seed):
    rng = np.random.default_rng(seed)
    map_ = cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), (40, 32), interpolation=cv2.INTER_CUBIC)
    if seed % 3 == 0:
        map_ = rgb((map_[..., 0] > 200).astype(np.uint8) * 255)
    changes = {"invert": 255 - map_, "swap": map_[..., ::-1], "blur": cv2.blur(map_, (3, 3)), "half": map_ // 2}
    map_ = np.ascontiguousarray(changes.get(fault, map_))
    after, done = mended(map_, kind)
    assert after.shape == map_.shape and after.dtype == np.uint8 and len(done) == len(set(done))
    again = [doubt.what for doubt in doubts(after, kind) if doubt.mend]
    assert set(again) <= set(done)


def test_the_command_tells_mends_and_overwrites_nothing(tmp_path, lines, floor, capsys):
    write_file(tmp_path / "a.canny.png", png_bytes(255 - lines, dump({"kind": "canny", "source": "a.jpg"})))
    write_file(tmp_path / "b.depth.png", png_bytes(floor))
    assert run("check", tmp_path / "b.depth.png", "--size", "128x96") == 0
    assert "nothing to doubt (depth, 128x96)" in capsys.readouterr().out
    assert run("check", tmp_path) == Exit.INPUT
    out = capsys.readouterr().out
    assert "a.canny.png: inverted lines: mostly white" in out and "MAP --fix" in out and "b.depth.png: nothing" in out
    assert run("check", tmp_path / "a.canny.png", "--fix") == 0
    fixed = tmp_path / "a.fixed.canny.png"
    assert "inverted lines: mended in" in capsys.readouterr().out
    condition = read_condition(str(fixed))
    assert (condition.rgb == lines).all() and condition.record["mended"] == ["inverted lines"]
    assert condition.record["source"] == "a.jpg"
    assert run("check", tmp_path / "a.canny.png", "--fix") == Exit.OUTPUT
    capsys.readouterr()
    assert run("check", tmp_path / "a.canny.png", "--fix", "--json", "--overwrite") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["mended"] == ["inverted lines"] and line["doubts"] == [] and line["output"] == str(fixed)
    before = sorted(tmp_path.iterdir())
    for wrong, code in (
        (("check", tmp_path / "b.depth.png", "-o", "x.png"), Exit.USAGE),
        (("check", tmp_path / "none.png"), Exit.INPUT),
        (("check", tmp_path / "b.depth.png", "--size", "100"), Exit.USAGE),
    ):  # fmt: skip
        assert run(*wrong) == code and "hint: " in capsys.readouterr().err
    (tmp_path / "c.canny.png").write_bytes(b"no picture")
    assert run("check", tmp_path / "b.depth.png", tmp_path / "c.canny.png") == Exit.PARTIAL
    (tmp_path / "c.canny.png").unlink()
    assert sorted(tmp_path.iterdir()) == before
