"""Training data as people have it: every form is recognised, every fault is told."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from controlnet.cli.main import main
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.data.forms import ImageFolder, Photos, _absent
from controlnet.preprocessors.data.mirror import flip_condition, flip_words
from controlnet.preprocessors.data.pairs import find_pairs, kind_of_pairs
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.errors import Exit, InputError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from helpers import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

CAPTIONS = [f"picture {i}" for i in range(6)]


def picture(seed, size=(48, 64)):
    image = np.full((*size, 3), 40 + 30 * seed, np.uint8)
    image[8 + seed : 30, 10 + 2 * seed : 40] = (250, 60, 20 * seed)
    return image


def photos(folder):
    for i, caption in enumerate(CAPTIONS):
        write_file(folder / f"{i}.png", png_bytes(picture(i)))
        (folder / f"{i}.txt").write_text(caption + "\n")


def photos_with_metadata(folder):
    for i in range(6):
        write_file(folder / f"{i}.png", png_bytes(picture(i)))
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def photos_with_csv(folder):
    for i in range(6):
        write_file(folder / f"{i}.png", png_bytes(picture(i)))
    (folder / "metadata.csv").write_text(
        "file_name,caption\n" + "".join(f'{i}.png,"{c}"\n' for i, c in enumerate(CAPTIONS))
    )


def pairs_in(folder, images, conditions):
    for i in range(6):
        write_file(folder / images / f"{i}.png", png_bytes(picture(i)))
        write_file(folder / conditions / f"{i}.png", png_bytes(canny(picture(i))))


def prompt_json(folder):
    pairs_in(folder, "target", "source")
    rows = [
        {"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": caption}
        for i, caption in enumerate(CAPTIONS)
    ]
    (folder / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def imagefolder(folder):
    pairs_in(folder, "a", "b")
    rows = [
        {"file_name": f"a/{i}.png", "conditioning_image": f"b/{i}.png", "text": caption}
        for i, caption in enumerate(CAPTIONS)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def two_folders(folder):
    pairs_in(folder, "images", "conditions")
    for i, caption in enumerate(CAPTIONS):
        (folder / "images" / f"{i}.txt").write_text(caption)


FORMS = {
    "photos": (photos, False), "photos_with_metadata": (photos_with_metadata, False),
    "photos_with_csv": (photos_with_csv, False), "prompt_json": (prompt_json, True),
    "imagefolder": (imagefolder, True), "two_folders": (two_folders, True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised(tmp_path, form):
    make, with_conditions = FORMS[form]
    make(tmp_path)
    found = find_pairs(tmp_path)
    assert [p.caption for p in found.pairs] == CAPTIONS and not found.missing and not found.extra
    for i, pair in enumerate(found.pairs):
        assert np.array_equal(read_image(pair.image.read_bytes(), "")[0], picture(i))
        assert (pair.condition is not None) == with_conditions
        if pair.condition:
            assert np.array_equal(read_image(pair.condition.read_bytes(), "")[0][..., 0], canny(picture(i)))


def test_missing_and_extra_files_are_told(tmp_path):
    two_folders(tmp_path)
    (tmp_path / "images/2.png").unlink()
    (tmp_path / "conditions/4.png").unlink()
    found = find_pairs(tmp_path)
    assert len(found.pairs) == 4 and found.missing == ("conditions/4",) and found.extra == ("conditions/2",)


def test_the_kind_is_told_by_names_text_or_flag(tmp_path):
    photos(tmp_path / "photos")
    assert kind_of_pairs(find_pairs(tmp_path / "photos"))[0] == "canny"
    two_folders(tmp_path / "pairs")
    found = find_pairs(tmp_path / "pairs")
    with pytest.raises(UsageError, match="do not tell their kind"):
        kind_of_pairs(found)
    assert kind_of_pairs(found, "blueprint")[0] == "blueprint"
    write_file(
        tmp_path / "pairs/conditions/0.png", png_bytes(canny(picture(0)), {"controlnet": json.dumps({"kind": "depth"})})
    )
    with pytest.raises(UsageError, match="several kinds"):
        kind_of_pairs(find_pairs(tmp_path / "pairs"))


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_pairs(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures found"):
        find_pairs(tmp_path / "empty")
    photos(tmp_path / "latin")
    (tmp_path / "latin/3.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match=r"3\.txt: not UTF-8"):
        find_pairs(tmp_path / "latin")
    prompt_json(tmp_path / "broken")
    with open(tmp_path / "broken/prompt.json", "a") as file:
        file.write("{nonsense\n")
    with pytest.raises(InputError, match="line 7: not valid JSON"):
        find_pairs(tmp_path / "broken")


def test_what_the_toolkit_wrote_is_no_photo(tmp_path):
    """`train .` in a folder that holds runs, maps beside photos, sheets and a built data set finds the photos alone."""
    photos(tmp_path)
    write_file(tmp_path / "0.canny.png", png_bytes(canny(picture(0))))
    write_file(tmp_path / "photos-check.png", png_bytes(picture(0)))
    markers = {"runs/photos-1/run.json": '{"settings": {}}', "data/manifest.json": '{"kind": "canny", "pairs": 6}'}
    for marker, text in markers.items():
        write_file(tmp_path / marker, text.encode())
        write_file((tmp_path / marker).parent / "pictures/samples.png", png_bytes(picture(0)))
    write_file(tmp_path / "more/portrait.canny.png", png_bytes(picture(3)))  # a photo's own name: no photo beside it
    found = [str(p.image.relative_to(tmp_path)) for p in find_pairs(tmp_path).pairs]
    assert found == [*(f"{i}.png" for i in range(6)), "more/portrait.canny.png"]


def test_captions_may_hold_any_character(tmp_path):
    odd = 'a "quoted" cube,\u2028on two lines\x85 of a floor'
    for name in ("0.png", "1.png"):
        write_file(tmp_path / name, png_bytes(picture(0)))
    rows = [{"file_name": "0.png", "text": odd}, {"file_name": "1.png", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert [p.caption for p in find_pairs(tmp_path).pairs] == [odd, "b"]
    (tmp_path / "metadata.jsonl").unlink()
    odd = 'two "lines",\nand a comma'
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["0.png", odd], ["1.png", "b"]])
    assert [p.caption for p in find_pairs(tmp_path).pairs] == [odd, "b"]


@pytest.mark.parametrize("manifest, told", [("{broken", "not valid JSON"), ("[]", "a list, expected a JSON object")])
def test_a_broken_manifest_is_refused(tmp_path, manifest, told):
    imagefolder(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=told):
        find_pairs(tmp_path)


def test_names_that_are_no_text_are_missing_files(tmp_path):
    prompt_json(tmp_path)
    with open(tmp_path / "prompt.json", "a") as file:
        file.write('{"source": 7, "target": ["x"], "prompt": "p"}\n')
    found = find_pairs(tmp_path)
    assert len(found.pairs) == 6 and found.missing == ("['x']", "7")


@given(st.text("leftrigh ,.LEFTRIGH", max_size=40))
def test_words_flipped_twice_are_the_same(text):
    assert flip_words(flip_words(text)) == text


def test_flips():
    told = "a cone on the left of a cube, Right: a ball. The leftover bright stays"
    assert flip_words(told) == "a cone on the right of a cube, Left: a ball. The leftover bright stays"
    normal = np.zeros((2, 3, 3), np.uint8)
    normal[:, 0] = (255, 10, 20)
    flipped = flip_condition(Condition(normal, "normal")).map
    assert flipped[0, 2].tolist() == [0, 10, 20] and flipped[0, 0].tolist() == [255, 0, 0]
    assert np.array_equal(flip_condition(Condition(normal, "canny")).map, normal[:, ::-1])
    with pytest.raises(UsageError, match="pose map without key points"):
        flip_condition(Condition(normal, "pose"))


def test_check_of_good_data(tmp_path, capsys):
    imagefolder(tmp_path / "data")
    assert run("dataset", "check", tmp_path / "data", "--kind", "canny", "-o", tmp_path / "sheet.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pairs"] == 6 and told["errors"] == 0 and told["sizes"] == {"64x48": 6}
    sheet, _ = read_image((tmp_path / "sheet.png").read_bytes(), "")
    assert sheet.shape[1] > 1000


FAULTS = {
    "corrupt picture": lambda d: (d / "images/1.png").write_bytes((d / "images/1.png").read_bytes()[:60]),
    "corrupt condition": lambda d: (d / "conditions/1.png").write_bytes(b"no picture"),
    "empty condition": lambda d: write_file(d / "conditions/1.png", png_bytes(np.zeros((48, 64), np.uint8))),
    "inverted lines": lambda d: write_file(d / "conditions/1.png", png_bytes(255 - canny(picture(1)))),
    "another aspect": lambda d: write_file(d / "conditions/1.png", png_bytes(canny(picture(1, (64, 64))))),
}
DOUBTS = {
    "no caption": lambda d: (d / "images/1.txt").unlink(),
    "duplicate": lambda d: (d / "images/1.png").write_bytes((d / "images/2.png").read_bytes()),
    "missing file": lambda d: (d / "conditions/1.png").unlink(),
    "extra file": lambda d: (d / "images/1.png").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS | DOUBTS)
def test_check_finds_each_fault(tmp_path, capsys, fault):
    two_folders(tmp_path / "data")
    (FAULTS | DOUBTS)[fault](tmp_path / "data")
    code = run("dataset", "check", tmp_path / "data", "--kind", "canny", "-o", tmp_path / "sheet.png", "--json")
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [p["what"] for p in problems] == [fault]
    assert code == (Exit.INPUT if fault in FAULTS else Exit.OK)


def split_folders(folder, form, names=("train", "validation", "test")):
    for name in names:
        form(folder / name)


@pytest.mark.parametrize("form", [photos, photos_with_metadata, photos_with_csv, prompt_json, imagefolder, two_folders])
def test_folders_for_a_split_are_its_split(tmp_path, form):
    split_folders(tmp_path, form)
    found = find_pairs(tmp_path)
    assert len(found.pairs) == 18 and not found.missing and not found.extra and not found.skipped
    for pair in found.pairs:
        assert pair.held_out == (pair.image.relative_to(tmp_path).parts[0] != "train")
        assert (pair.condition is None) == (form in (photos, photos_with_metadata, photos_with_csv))


def test_the_standard_layout_of_image_data_sets(tmp_path):
    """datasets' imagefolder with a metadata file for each split, as `train/metadata.jsonl`."""
    for name in ("train", "test"):
        pairs_in(tmp_path / name, "images", "conditioning_images")
        rows = [
            {"file_name": f"images/{i}.png", "conditioning_image": f"conditioning_images/{i}.png", "text": caption}
            for i, caption in enumerate(CAPTIONS)
        ]
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = find_pairs(tmp_path)
    assert found.form == "imagefolder" and len(found.pairs) == 12 and not found.extra
    assert sum(bool(pair.held_out) for pair in found.pairs) == 6
    assert {pair.caption for pair in found.pairs} == set(CAPTIONS)


def test_own_data_with_a_test_folder_beside_it(tmp_path):
    imagefolder(tmp_path)
    imagefolder(tmp_path / "test")
    found = find_pairs(tmp_path)
    assert len(found.pairs) == 12 and sum(bool(pair.held_out) for pair in found.pairs) == 6 and not found.extra


@pytest.mark.parametrize("form", [photos_with_metadata, prompt_json, imagefolder, two_folders])
def test_data_one_level_too_high_is_named(tmp_path, form):
    form(tmp_path / "pairs")
    with pytest.raises(InputError, match=r"the data lies in .*pairs") as error:
        find_pairs(tmp_path)
    assert str(tmp_path / "pairs") in error.value.hint


def test_metadata_below_that_is_not_used_is_told(tmp_path):
    photos_with_metadata(tmp_path)
    photos_with_metadata(tmp_path / "more")
    assert find_pairs(tmp_path).skipped == ("more (its own metadata is not read)",)


def test_parquet_metadata(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pairs_in(tmp_path, "a", "b")
    columns = {"file_name": [f"a/{i}.png" for i in range(6)], "conditioning_image": [f"b/{i}.png" for i in range(6)]}
    parquet.write_table(pyarrow.table(columns | {"text": CAPTIONS}), tmp_path / "metadata.parquet")
    found = find_pairs(tmp_path)
    assert found.form == "imagefolder" and [pair.caption for pair in found.pairs] == CAPTIONS
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a Parquet file"):
        find_pairs(tmp_path)


def test_every_picture_that_pillow_reads(tmp_path):
    """And the others are named with the reason."""
    for i, ending in enumerate(("jfif", "avif", "jp2", "heic", "webp", "tga")):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.{ending}")
        (tmp_path / f"{i}.caption").write_text(CAPTIONS[i])
    (tmp_path / "raw.dng").write_bytes(b"x")
    found = find_pairs(tmp_path)
    assert [pair.caption for pair in found.pairs] == CAPTIONS
    assert found.skipped == ("raw.dng (.dng files are not read: save it as PNG or JPEG)",)
    for pair in found.pairs:
        assert read_image(pair.image.read_bytes(), pair.image.name)[0].shape == (48, 64, 3)


def test_a_row_with_two_conditions(tmp_path):
    imagefolder(tmp_path)
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "a/0.png", "conditioning_image": ["b/0.png", "b/1.png"], "text": "x"}\n')
    with pytest.raises(InputError, match="row 7 has 2 conditions"):
        find_pairs(tmp_path)


def test_captions_with_half_a_character_and_links_in_a_circle(tmp_path):
    photos_with_metadata(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(find_pairs(tmp_path).pairs) == 6
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0.png", "text": "\\ud800"}\n')
    with pytest.raises(InputError, match="half a character"):
        find_pairs(tmp_path)


def packed(folder, out, size=3):
    """The pairs of a folder with images/ and conditions/ as tar files."""
    found = find_pairs(folder)
    out.mkdir()
    for number in range(0, len(found.pairs), size):
        with tarfile.open(out / f"{number // size:06d}.tar", "w") as tar:
            for pair in found.pairs[number : number + size]:
                files = {"png": pair.image.read_bytes(), "txt": pair.caption.encode()}
                files |= {"conditioning_image.png": pair.condition.read_bytes()} if pair.condition else {}
                for ending, data in files.items():
                    member = tarfile.TarInfo(f"{pair.image.stem}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return out


def test_pairs_in_tar_files(tmp_path, capsys):
    photos(tmp_path / "photos")
    with pytest.raises(SystemExit):
        main(["dataset", "build", str(tmp_path / "photos"), "-o", str(tmp_path / "data"), "--size", "64", "-j", "1"])
    found, inside = find_pairs(tmp_path / "data"), find_pairs(packed(tmp_path / "data", tmp_path / "tars"))
    assert inside.form == "webdataset" and len(inside.pairs) == len(found.pairs)
    for a, b in zip(found.pairs, inside.pairs, strict=True):
        assert a.caption == b.caption and np.array_equal(a.picture(), b.picture())
        assert np.array_equal(a.read_condition("canny").rgb, b.read_condition("canny").rgb)
    assert kind_of_pairs(inside)[0] == "canny"  # from the conditions' own text
    with pytest.raises(SystemExit) as stop:
        main(["dataset", "check", str(tmp_path / "tars")])
    assert stop.value.code == 0 and "form webdataset, kind canny" in capsys.readouterr().out


@pytest.mark.parametrize("spoil, said", [
    (lambda data: data[: len(data) // 2], "cut off|not a whole tar"), (lambda data: b"", "not a whole tar"),
    (lambda data: b"x" * 2000, "not a whole tar"),
])  # fmt: skip
def test_tar_files_that_are_not_whole(tmp_path, spoil, said):
    photos(tmp_path / "photos")
    tars = packed(tmp_path / "photos", tmp_path / "tars")
    first = tars / "000000.tar"
    first.write_bytes(spoil(first.read_bytes()))
    with pytest.raises(InputError, match=said) as caught:
        find_pairs(tars)
    assert "000000.tar" in str(caught.value)


@pytest.mark.parametrize("names, missing", [
    (["20240115"], []), (["1700000000"], []), (["000001", "000003"], ["000000.tar", "000002.tar"]),
    (["00", "05", "09"], [f"0{i}.tar" for i in (1, 2, 3, 4, 6, 7, 8)]),
])  # fmt: skip
def test_numbers_of_tar_files(names, missing):
    assert list(_absent([Path(f"{name}.tar") for name in names])) == missing


def test_a_sample_without_a_map_is_no_pair(tmp_path):
    pairs_in(tmp_path / "pairs", "images", "conditions")
    tars = packed(tmp_path / "pairs", tmp_path / "tars", 6)
    with tarfile.open(tars / "000001.tar", "w") as tar:
        data = png_bytes(picture(1))
        member = tarfile.TarInfo("alone.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    found = find_pairs(tars)
    assert len(found.pairs) == 6 and any("alone.png" in name for name in found.extra)


@pytest.mark.parametrize("told, held_out", [
    ("train", False), ("Train", False), ("training", False), ("held_out", True), ("test", True), (None, None),
    ("", None),
])  # fmt: skip
def test_splits_in_metadata(tmp_path, told, held_out):
    """Of pairs and of photos; without one, the folder says it."""
    for i, folder in enumerate(("train", "test", "here")):
        write_file(tmp_path / folder / f"{i}.png", png_bytes(picture(i)))
        write_file(tmp_path / folder / f"{i}-map.png", png_bytes(picture(i)))
    names = ["train/0", "test/1", "here/2"]
    rows = [{"file_name": f"{n}.png", "conditioning_image": f"{n}-map.png", "split": told} for n in names]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [False, True, None] if held_out is None else [held_out] * 3
    assert [pair.held_out for pair in ImageFolder().read(tmp_path, ()).pairs] == expected
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({**r, "conditioning_image": ""}) + "\n" for r in rows))
    found = {str(pair.image.relative_to(tmp_path)): pair.held_out for pair in Photos().read(tmp_path, ()).pairs}
    assert [found[f"{name}.png"] for name in names] == expected


def test_a_folder_with_a_manifest_of_others_is_looked_into(tmp_path):
    photos(tmp_path / "a")
    (tmp_path / "a/manifest.json").write_text('{"name": "an app"}')
    photos(tmp_path / "b")
    (tmp_path / "b/manifest.json").write_text('{"kind": "canny", "pairs": 6}')
    assert {pair.image.parent.name for pair in find_pairs(tmp_path).pairs} == {"a"}


def test_a_missing_tar_file_is_named(tmp_path):
    photos(tmp_path / "photos")
    tars = packed(tmp_path / "photos", tmp_path / "tars", 1)
    (tars / "000001.tar").unlink()
    assert find_pairs(tars).missing == ("000001.tar",)
