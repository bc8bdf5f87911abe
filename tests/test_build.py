"""`dataset build`: pairs made of photos, all of them or those that are new."""

import json

import numpy as np
import pytest
from controlnet.preprocessors.data.build import _names, options_of
from controlnet.preprocessors.data.pairs import find_pairs, kind_of_pairs
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.errors import Exit, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from helpers import run
from test_pairs import CAPTIONS, photos, picture, split_folders


def test_photos_of_one_name_get_names_of_their_own(tmp_path):
    for name in ("a/b.png", "a-b.png", "A/b.png", "a/b.jpg", "c.png"):
        write_file(tmp_path / "photos" / name, png_bytes(picture(1)))
    names = _names(find_pairs(tmp_path / "photos"))
    assert len({name.lower() for name in names}) == 5 and "c" in names


def test_build_into_the_photos_folder_is_refused(tmp_path, capsys, monkeypatch):
    photos(tmp_path / "photos")
    assert run("dataset", "build", tmp_path / "photos", "-o", tmp_path / "photos/data") == Exit.USAGE
    err = capsys.readouterr().err
    assert "would be taken for photos" in err and f"hint: -o {tmp_path}/photos-data" in err
    monkeypatch.chdir(tmp_path / "photos")
    assert run("dataset", "build", ".", "-o", "data") == Exit.USAGE
    assert "hint: -o ../photos-data" in capsys.readouterr().err


def test_build_makes_pairs_and_goes_on_where_it_stopped(tmp_path, capsys):
    photos(tmp_path / "photos")
    (tmp_path / "photos/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    command = ("dataset", "build", tmp_path / "photos", "--kind", "canny", "--size", "64", "-j", "2")
    assert run(*command, "-o", tmp_path / "data") == Exit.PARTIAL
    assert "broken.jpg" in capsys.readouterr().err
    found = find_pairs(tmp_path / "data")
    assert len(found.pairs) == 6 and kind_of_pairs(found) == ("canny", "from the manifest")
    assert sorted(p.caption for p in found.pairs) == CAPTIONS
    for pair in found.pairs:
        image, condition = (read_image(p.read_bytes(), "")[0] for p in (pair.image, pair.condition))
        assert image.shape == (64, 64, 3) and np.array_equal(condition[..., 0], canny(image))

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*.png")}
    (tmp_path / "data/conditions/2.png").write_bytes(b"cut")
    write_file(tmp_path / "photos/3.png", png_bytes(picture(5, (60, 60))))
    assert run(*command, "-o", tmp_path / "data") == Exit.PARTIAL
    changed = {p.stem for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert changed == {"2", "3"}
    assert run(*command, "--set", "low=20", "-o", tmp_path / "data") == Exit.PARTIAL
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["options"]["low"] == 20 and manifest["pairs"] == 6


def test_build_that_cannot_write_anything_says_so(tmp_path, capsys):
    photos(tmp_path / "photos")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").write_bytes(b"in the way")
    assert run("dataset", "build", tmp_path / "photos", "--size", "64", "-o", tmp_path / "data") == Exit.OUTPUT
    assert "none of 6 photos could be used" in capsys.readouterr().err
    assert not (tmp_path / "data/metadata.jsonl").exists()


@pytest.mark.parametrize("place", ["pairs/photos", "elsewhere"])
def test_packing_removes_nothing_that_was_there(tmp_path, place):
    photos(tmp_path / "data" / place)
    write_file(tmp_path / "data/pairs/notes.txt", b"mine")
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    build = ("dataset", "build", tmp_path / "data" / place, "-o", tmp_path / "data", "--size", "64", "-j", "1")
    assert run(*build, "--to", "webdataset", "--per-file", "3") == 0
    assert all(path.read_bytes() == data for path, data in before.items())
    assert sorted(path.name for path in (tmp_path / "data").glob("*.tar")) == ["000000.tar", "000001.tar"]
    assert not (tmp_path / "data/.pairs").exists()


def test_options_are_yes_or_no():
    assert options_of("canny", ["auto=True"])["auto"] is True and options_of("canny", ["auto=false"])["auto"] is False
    with pytest.raises(UsageError, match="auto=yes: expected bool"):
        options_of("canny", ["auto=yes"])


def test_build_keeps_what_another_data_set_holds(tmp_path, capsys):
    for name in ("a", "b"):
        for i in range(5):
            write_file(tmp_path / name / f"{name}{i}.png", png_bytes(picture(i)))
    build = ("dataset", "build", "-o", tmp_path / "out", "--size", "64", "-j", "1")
    assert run(*build, tmp_path / "a") == 0
    before = (tmp_path / "out/metadata.jsonl").read_bytes()
    for more, told in (((tmp_path / "b",), "5 pairs of other photos"), ((tmp_path / "a", "--size", "128"), "of size"),
                       ((tmp_path / "a", "--kind", "lineart"), "of kind canny")):  # fmt: skip
        assert run(*build[:4], "--size", "64", *more) == Exit.USAGE and told in capsys.readouterr().err
    assert (tmp_path / "out/metadata.jsonl").read_bytes() == before
    assert run("dataset", "check", tmp_path / "a", "-o", tmp_path / "s.png") == 0
    for i in range(3):
        (tmp_path / f"a/a{i}.png").unlink()
    assert run("dataset", "check", tmp_path / "a", "-o", tmp_path / "s.png") == Exit.INPUT
    assert "too few pairs" in capsys.readouterr().out


def test_build_holds_out_some_and_is_read_as_an_imagefolder(tmp_path):
    for i in range(10):
        write_file(tmp_path / "photos" / f"{i}.png", png_bytes(picture(i % 6, (48 + i, 64))))
    assert run("dataset", "build", tmp_path / "photos", "--size", "64", "-o", tmp_path / "data", "-j", "1") == 0
    rows = [json.loads(line) for line in (tmp_path / "data/metadata.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows].count("held_out") == 2
    assert all((tmp_path / "data" / row[key]).is_file() for row in rows for key in ("file_name", "conditioning_image"))


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--kind", "cany"), "unknown kind"), (("--set", "lo=3"), "unknown option"),
        (("--size", "500"), "multiple of 8"), (("--set", "low=x"), "expected int"),
        (("--resize", "keep"), "expected crop"),
    ],
)  # fmt: skip
def test_build_refuses_bad_flags(tmp_path, capsys, flags, told):
    photos(tmp_path / "photos")
    assert run("dataset", "build", tmp_path / "photos", "-o", tmp_path / "data", *flags) == Exit.USAGE
    assert told in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_build_keeps_the_split_of_the_photos(tmp_path, capsys):
    split_folders(tmp_path / "photos", photos, ("train", "val"))
    assert run("dataset", "build", tmp_path / "photos", "-o", tmp_path / "data", "--size", 64, "-j", 1) == 0
    rows = [json.loads(line) for line in (tmp_path / "data/metadata.jsonl").read_text().splitlines()]
    assert {row["file_name"].startswith("images/val"): row["split"] for row in rows} == {
        True: "held_out", False: "train",
    }  # fmt: skip
