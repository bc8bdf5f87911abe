"""`controlnet detect` as a user types it."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from controlnet.preprocessors.detectors.registry import DETECTORS, find_detector
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.images import read_image
from PIL import Image


@pytest.fixture
def folder(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "one.png")
    Image.fromarray(photo[:, ::-1]).save(tmp_path / "two.jpg")
    return tmp_path


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_one_photo(run, folder):
    code, out, err = run("detect", "canny", folder / "one.png")
    assert (code, out, err) == (0, f"{folder}/one.canny.png\n", "")
    map_ = Image.open(folder / "one.canny.png")
    assert (map_.mode, map_.size) == ("L", (512, 512))
    assert set(np.unique(map_)) == {0, 255}
    _, text = read_image((folder / "one.canny.png").read_bytes(), "x")
    made = json.loads(text["controlnet"])
    assert made["kind"] == "canny" and made["source"] == "one.png" and len(made["source_sha256"]) == 64
    assert made["options"] == {"low": 100, "high": 200, "auto": False}


def test_options_reach_the_detector(run, folder):
    run("detect", "canny", folder / "one.png", "-o", folder / "a.png", "--low", 10, "--high", 20, "--size", "128x64")
    run("detect", "canny", folder / "one.png", "-o", folder / "b.png", "--low", 900, "--high", 1900, "--size", "128x64")
    a, b = (np.asarray(Image.open(folder / f"{n}.png")) for n in "ab")
    assert a.shape == b.shape == (64, 128)
    assert a.sum() > b.sum()


def test_keep_and_json_lines(run, folder):
    code, out, _ = run("detect", "canny", folder, "--resize", "keep", "--json", "--auto")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [Path(line["output"]).name for line in lines] == ["one.canny.png", "two.canny.png"]
    assert all(line["size"] == [128, 96] and line["options"]["auto"] for line in lines)


def test_folders_skip_earlier_maps_and_search_deeper_when_asked(run, folder):
    (folder / "deep").mkdir()
    (folder / "two.jpg").rename(folder / "deep" / "two.jpg")
    assert run("detect", "canny", folder, "-o", f"{folder}/maps/")[0] == 0
    assert files(folder) == ["deep/two.jpg", "maps/one.canny.png", "one.png"]
    assert run("detect", "canny", folder, "-r", "--skip-existing")[0] == 0
    assert files(folder) == ["deep/two.canny.png", "deep/two.jpg", "maps/one.canny.png", "one.canny.png", "one.png"]


def test_existing_files(run, folder):
    target = folder / "one.canny.png"
    target.write_bytes(b"mine")
    code, _, err = run("detect", "canny", folder / "one.png")
    assert code == Exit.OUTPUT and "exists already" in err and "--overwrite" in err
    assert run("detect", "canny", folder / "one.png", "--skip-existing", "--overwrite")[0] == Exit.USAGE
    code, out, _ = run("detect", "canny", folder / "one.png", "--skip-existing")
    assert code == 0 and out == f"{target}\n" and target.read_bytes() == b"mine"
    assert run("detect", "canny", folder / "one.png", "--overwrite")[0] == 0
    assert target.read_bytes() != b"mine"


def test_a_bad_file_among_good_ones(run, folder):
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    code, out, err = run("detect", "canny", folder)
    assert code == Exit.PARTIAL
    assert len(out.splitlines()) == 2 and "bad.png" in err and "1 of 3 maps failed" in err
    assert "bad.canny.png" not in files(folder)


def test_standard_input_and_output(folder):
    data = (folder / "one.png").read_bytes()
    command = [sys.executable, "-m", "controlnet.cli.main", "detect", "canny", "-", "--size", "64"]
    done = subprocess.run(command, input=data, capture_output=True, cwd=folder, check=True)
    assert read_image(done.stdout, "x")[0].shape == (64, 64, 3)
    assert files(folder) == ["one.png", "two.jpg"]


@pytest.mark.parametrize("args, code, said", [
    (["cany", "x.png"], Exit.USAGE, "unknown kind 'cany'"), ([], Exit.USAGE, "which kind"),
    (["canny", "none.png"], Exit.INPUT, "no such file"), (["canny", "empty/"], Exit.INPUT, "holds no pictures"),
    (["canny", "one.png", "--size", "500"], Exit.USAGE, "--size 504"),
    (["canny", "one.png", "--resize", "squeeze"], Exit.USAGE, "crop, pad, stretch, keep"),
    (["canny", "one.png", "--low", "300"], Exit.USAGE, "low=300, high=200"),
    (["canny", "one.png", "--detector", "sobel"], Exit.USAGE, "unknown detector 'sobel'"),
    (["canny", "one.png", "two.jpg", "-o", "-"], Exit.USAGE, "takes one result"),
    (["canny", "one.png", "two.jpg", "-o", "maps.png"], Exit.USAGE, "-o maps/"),
    (["canny", "one.png", "-o", "map.jpg"], Exit.USAGE, "-o map.png"),
    (["canny", "one.png", "./one.png", "deep/one.png", "-o", "maps/"], Exit.USAGE, "two inputs would both be written"),
    (["canny", "one.png", "-o", "one.png/x/"], Exit.OUTPUT, "cannot be written"),
    (["canny", "tiny.png"], Exit.INPUT, "at least 8"),
])  # fmt: skip
def test_mistakes_are_told_and_leave_nothing(run, folder, monkeypatch, args, code, said):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    before = files(folder)
    found, out, err = run("detect", *args)
    assert found == code
    assert err.startswith("error: ") and said in err and "Traceback" not in err
    assert out == "" and files(folder) == before


@pytest.mark.parametrize("photos", [["one.png"], ["one.png", "two.jpg"]])
def test_a_name_that_is_no_png_is_a_folder(run, folder, monkeypatch, photos):
    monkeypatch.chdir(folder)
    assert run("detect", "canny", *photos, "-o", "v1.5")[0] == 0
    assert files(folder / "v1.5") == [f"{photo.split('.')[0]}.canny.png" for photo in photos]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(run, folder):
    (folder / "locked").mkdir(mode=0o500)
    assert run("detect", "canny", folder / "one.png", "-o", f"{folder}/locked/")[0] == Exit.OUTPUT


def test_skip_existing_looks_at_the_size_and_leaves_foreign_maps(run, folder):
    assert run("detect", "canny", folder / "one.png")[0] == 0
    for size, skipped in (("512", True), ("256", False), ("256", True)):
        code, out, _ = run("detect", "canny", folder / "one.png", "--skip-existing", "--size", size, "--json")
        assert code == 0 and bool(json.loads(out).get("skipped")) == skipped
    foreign = folder / "points.pose.png"
    Image.new("RGB", (64, 64)).save(foreign)
    before = foreign.read_bytes()
    (folder / "points.json").write_text(json.dumps({
        "people": [{"pose_keypoints_2d": [10.0, 10.0, 1.0] * 18}], "canvas_width": 64, "canvas_height": 64
    }))  # fmt: skip
    assert run("detect", "pose", folder / "points.json", "--skip-existing", "--keypoints", folder / "k.json")[0] == 0
    assert foreign.read_bytes() == before


def test_skip_existing_looks_at_photo_and_options(run, folder):
    assert run("detect", "canny", folder)[0] == 0
    before = {p: p.read_bytes() for p in folder.glob("*.canny.png")}
    code, out, _ = run("detect", "canny", folder, "--skip-existing", "--json")
    assert code == 0 and all(json.loads(line)["skipped"] for line in out.splitlines())
    (folder / "one.png").write_bytes((folder / "two.jpg").read_bytes())
    assert run("detect", "canny", folder, "--skip-existing")[0] == 0
    assert [p.name for p, data in before.items() if p.read_bytes() != data] == ["one.canny.png"]
    assert run("detect", "canny", folder, "--skip-existing", "--low", "50")[0] == 0
    assert all(p.read_bytes() != data for p, data in before.items())


def test_many_photos_are_told_in_order_and_made_as_one_is(run, folder):
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (64, 64 + 8 * i, 3), np.uint8)).save(folder / f"p{i:02}.png")
    code, out, err = run("detect", "canny", folder, "--size", "64", "--preview", folder / "sheet.png")
    names = [Path(line).name for line in out.splitlines()]
    assert code == 0 and names == sorted(names) and len(names) == 22 and "look at" in err
    assert read_image((folder / "sheet.png").read_bytes(), "")[0].shape[1] > 1000
    for i in (0, 7, 19):
        map_ = folder / f"p{i:02}.canny.png"
        many = map_.read_bytes()
        assert run("detect", "canny", folder / f"p{i:02}.png", "--size", "64", "--overwrite")[0] == 0
        assert map_.read_bytes() == many


def test_a_sheet_that_nobody_asked_for_is_in_nobodys_way(run, folder):
    """Each shard shows its own; one that is there stays."""
    flags = ("detect", "all", folder, "--offline", "--size", "64", "-o")
    maps, again = folder.parent / "maps", folder.parent / "again"
    for part in ("1/2", "2/2"):  # one photo each, or two and none
        assert run(*flags, maps, "--shard", part)[0] in (Exit.OK, Exit.PARTIAL)
    sheets = {name for name in files(maps) if "all" in name}
    assert sheets and sheets <= {"all-1-of-2.png", "all-2-of-2.png"}
    assert run(*flags, again)[0] == Exit.PARTIAL
    sheet = (again / "all.png").read_bytes()
    Image.new("RGB", (64, 64), "red").save(folder / "new.png")
    assert run(*flags, again, "--skip-existing")[0] == Exit.PARTIAL
    assert (again / "all.png").read_bytes() == sheet and "new.canny.png" in files(again)


def test_a_map_of_every_kind(run, folder):
    code, out, err = run(
        "detect", "all", folder / "one.png", "--offline", "--size", "64", "--preview", folder / "s.png"
    )
    made = {Path(line).name for line in out.splitlines()}
    # The cache of a test is empty: the kinds that need weights from elsewhere are told, the others made.
    assert code == Exit.PARTIAL and made == {
        f"one.{kind}.png"
        for kind in DETECTORS
        if not find_detector(kind).weights or find_detector(kind).weights == ("tiny-depth",)
    }
    assert {"one.canny.png", "one.depth.png", "one.shuffle.png", "one.inpaint.png"} <= made
    assert "error: pose: the weights blazepose are not on this machine" in err
    assert "s.png" in files(folder) and "one.pose.png" not in files(folder)
    assert np.asarray(Image.open(folder / "s.png")).shape[0] > 3 * 256  # the photo, and a cell for each kind
    assert (
        run("detect", "all", folder / "one.png", "--offline", "--size", "64", "-o", f"{folder}/m/")[0] == Exit.PARTIAL
    )
    assert (folder / "m/one.all.png").is_file() and "one.all.png" not in files(folder)
    code, out, err = run("detect", "all", folder / "one.png", "--offline", "-o", f"{folder}/m/")
    assert code == Exit.PARTIAL and out == "" and "one.canny.png: exists already" in err
    assert run("detect", "all", "-")[0] == Exit.USAGE
    assert run("detect", "all", folder / "one.png", "-o", folder / "x.png")[0] == Exit.USAGE
    code, _, told = run("detect", "all", folder / "none.png")
    assert code == Exit.INPUT and told.count("no such file") == 1


def test_options_of_another_detector(run, folder):
    code, _, err = run("detect", "pose", folder / "one.png", "--detector", "openpose", "--people", "2")
    assert code == Exit.USAGE and "--people is not an option of detector openpose" in err
    assert "hint: --detector blazepose" in err
    code, _, err = run("detect", "pose", folder / "one.png", "--hands")
    assert code == Exit.USAGE and "hint: --detector dwpose" in err
    code, _, err = run("detect", "pose", folder / "one.png", "--detector", "openpose", "--allow-empty", "--offline")
    assert code == Exit.MODEL and "the weights openpose are not on this machine (510 MB" in err


def test_every_detector_of_the_table(run):
    """Its map has the photo's size, and every option has a flag with a help text."""
    image = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    for kind, detectors in DETECTORS.items():
        for row in detectors.values():
            if not row.weights:
                map_, _ = row.ready(row.load_options()())(image)
                assert map_.dtype == np.uint8 and map_.shape[:2] == image.shape[:2]
        _, out, _ = run("detect", kind, "--help")
        options = next(iter(detectors.values())).load_options()
        for field in fields(options):
            assert f"--{field.name.replace('_', '-')}" in out
    _, out, _ = run("detect", "--list", "--json")
    assert {json.loads(line)["kind"] for line in out.splitlines()} == set(DETECTORS)


@pytest.mark.parametrize("args", [
    ["--help"], ["detect", "canny", "one.png"], ["detect", "pose", "one.png", "--offline"], ["detect", "--list"],
    ["generate", "--help"],
])  # fmt: skip
def test_no_heavy_import(folder, args):
    """Help, canny and pose import neither torch nor the libraries on top of it; help not even numpy."""
    heavy = ["torch", "diffusers", "transformers", "controlnet_aux"] + (
        ["numpy", "cv2", "PIL"] if "--help" in args else []
    )
    code = f"""
import sys
from controlnet.cli.main import main
try: main({args!r})
except SystemExit: pass
print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_several_commands_at_once_skip_what_is_there(folder):
    for i in range(30):
        (folder / f"{i}.png").write_bytes((folder / "one.png").read_bytes())
    command = [sys.executable, "-m", "controlnet.cli.main", "detect", "canny", ".", "-o", "maps", "--skip-existing"]
    three = [subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for process in three:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and len(out.split()) == 32, err
    assert not list((folder / "maps").glob(".*"))


def test_what_a_folder_has_that_cannot_be_read_is_named(run, folder):
    (folder / "raw.dng").write_bytes(b"x")
    code, out, err = run("detect", "canny", folder)
    assert code == 0 and "1 pictures skipped" in err and "raw.dng (.dng files are not read" in err
    code, out, err = run("detect", "canny", "-", "--json")
    assert (code, out) == (Exit.USAGE, "") and "-o map.png --json" in err


def test_a_photo_without_lines_is_told(run, folder):
    """Its map is written, as of any photo; others are made without a word."""
    Image.new("RGB", (64, 64), (90, 120, 40)).save(folder / "flat.png")
    code, out, err = run("detect", "canny", folder)
    assert code == 0 and len(out.splitlines()) == 3
    assert err.count("warning:") == 1 and "flat.png: no lines found, its map is empty" in err
