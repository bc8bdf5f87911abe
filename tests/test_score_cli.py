"""`controlnet score`, and `generate --keep-best`."""

import json

import numpy as np
import pytest
from controlnet.model.work.score import interval
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.metadata import dump
from controlnet.preprocessors.skeleton import draw, to_text, whole
from PIL import Image
from test_skeleton import standing


@pytest.fixture
def files(tmp_path, photo, run):
    """A photo, its canny and depth map at its size, and another photo."""
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(photo[::-1, ::-1]).save(tmp_path / "other.png")
    for kind in ("canny", "depth"):
        assert run("detect", kind, tmp_path / "photo.png", "--size", "128x96", "--offline")[0] == 0
    return tmp_path


def told(run, *args):
    code, out, err = run("score", *args, "--json", "--offline")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_an_image_that_is_its_own_condition_is_perfect_and_another_is_not(run, files):
    (own,) = told(run, files / "photo.png", "--cond", files / "photo.canny.png")
    assert (own["kind"], own["f1"], own["f1_near"], own["ssim"]) == ("canny", 1, 1, 1)
    (other,) = told(run, files / "other.png", "--cond", files / "photo.canny.png")
    assert other["f1"] < other["f1_near"] < 0.9 and other["ssim"] < 0.9
    both = told(run, files / "photo.png", "--cond", files / "photo.canny.png", "--cond", files / "photo.depth.png")
    assert [row["kind"] for row in both] == ["canny", "depth"]
    assert both[1]["rank_correlation"] == pytest.approx(1, abs=1e-3) and both[1]["rmse"] < 1
    assert told(run, files / "other.png", "--cond", files / "photo.depth.png")[0]["rmse"] > 10


def test_a_photo_is_a_condition_when_its_map_is_made(run, files):
    (own,) = told(run, files / "photo.png", "--cond", f"{files}/photo.png,detect=canny")
    assert own["kind"] == "canny" and own["f1"] > 0.95
    assert told(run, files / "other.png", "--cond", f"{files}/photo.png,detect=canny")[0]["f1_near"] < 0.9


def test_the_maps_own_options_are_used(run, files):
    run(
        "detect",
        "canny",
        files / "photo.png",
        "--size",
        "128x96",
        "--low",
        10,
        "--high",
        20,
        "-o",
        files / "m.canny.png",
    )
    assert told(run, files / "photo.png", "--cond", files / "m.canny.png")[0]["f1"] == 1


def test_table_and_overlay(run, files):
    code, out, _ = run("score", files / "other.png", "--cond", files / "photo.canny.png", "--overlay", files / "o.png")
    assert code == 0 and "f1 near" in out and "photo.canny.png (canny)" in out
    sheet, _ = read_image((files / "o.png").read_bytes(), "o")
    assert (sheet == (255, 0, 0)).all(2).any() and (sheet == (0, 0, 255)).all(2).any()
    assert run("score", files / "other.png", "--cond", files / "photo.canny.png", "--overlay", files / "o.png")[0] == 4
    assert run("score", files / "other.png", "--cond", files / "photo.canny.png", "--overlay", files / "o.jpg")[0] == 2


def test_poses(run, tmp_path, monkeypatch):
    """With a detector that finds a given pose: the same one is perfect, one beside it is not, nobody is 0."""
    from controlnet.preprocessors.detectors.detector import Detector

    people = [standing()]
    text = dump({"kind": "pose", "keypoints": to_text(people)})
    write_file(tmp_path / "m.pose.png", png_bytes(draw(people, (128, 128)), text))
    Image.fromarray(np.full((128, 128, 3), 90, np.uint8)).save(tmp_path / "i.png")
    fields = {"keypoints": []}
    monkeypatch.setattr(Detector, "ready", lambda *args, **options: lambda image, place=None: (image, fields))
    fields["keypoints"] = to_text(people)
    flags = (tmp_path / "i.png", "--cond", tmp_path / "m.pose.png")
    assert [told(run, *flags)[0][key] for key in ("oks", "pck", "people", "found")] == [1, 1, 1, 1]
    with_hands = [whole(standing(), standing()[[0] * 21], None, None)]  # which have no score
    text = dump({"kind": "pose", "keypoints": to_text(with_hands)})
    write_file(tmp_path / "h.pose.png", png_bytes(draw(with_hands, (128, 128)), text))
    hands = (tmp_path / "i.png", "--cond", tmp_path / "h.pose.png")
    assert [told(run, *hands)[0][key] for key in ("oks", "pck", "people", "found")] == [1, 1, 1, 1]
    assert [told(run, *flags)[0][key] for key in ("oks", "pck", "people", "found")] == [1, 1, 1, 1]
    fields["keypoints"] = to_text([people[0] + (0.03, 0, 0), people[0] + (0.4, 0, 0)])
    near = told(run, *flags, "--overlay", tmp_path / "o.png")[0]
    assert 0.2 < near["oks"] < 0.99 and near["pck"] == 1 and near["found"] == 2
    fields["keypoints"] = []
    assert [told(run, *flags)[0][key] for key in ("oks", "pck")] == [0, 0]


def test_jobs_give_means_with_intervals(run, files):
    cond = str(files / "photo.canny.png")
    lines = [{"image": str(files / name), "cond": cond} for name in ("photo.png", "other.png")]
    (files / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"image": "gone.png"}]))
    code, out, err = run("score", "--jobs", files / "jobs.jsonl", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == Exit.PARTIAL and "line 3" in err and "1 of 3 lines failed" in err
    mean = next(row for row in rows if row.get("score") == "f1")
    assert mean["n"] == 2 and mean["low"] <= mean["mean"] <= mean["high"]
    assert mean["mean"] == pytest.approx((rows[0]["f1"] + rows[1]["f1"]) / 2, abs=1e-4)


def test_the_interval_is_the_normal_ones_for_many():
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    mean, low, high = interval(values)
    assert mean == pytest.approx(np.mean(values))
    half = 1.96 * np.std(values) / 20
    assert (mean - low) == pytest.approx(half, rel=0.1) and (high - mean) == pytest.approx(half, rel=0.1)
    assert interval(values) == (mean, low, high)


@pytest.mark.parametrize("args, code, said", [
    (("{f}/photo.png", "--cond", "{f}/wide.canny.png"), Exit.INPUT, "another aspect"),
    (("{f}/photo.png", "--cond", "{f}/photo.png"), Exit.USAGE, "says its kind"),
    (("{f}/photo.png", "--cond", "{f}/photo.png,kind=seg"), Exit.USAGE, "has no score"),
    (("{f}/photo.png", "--cond", "{f}/empty.canny.png"), Exit.INPUT, "one flat colour"),
    (("{f}/photo.png", "--cond", "{f}/plain.pose.png"), Exit.INPUT, "no key points"),
    (("{f}/photo.png",), Exit.INPUT, "names no condition"),
    ((), Exit.USAGE, "give an image"),
    (("--jobs", "{f}/none.jsonl"), Exit.INPUT, "no jobs in it"),
    (("--jobs", "{f}/photo.png"), Exit.INPUT, "is not text, expected jobs"),
    (("{f}/photo.png", "--cond", "{f}/photo.png,detect=canny,scale=2"), Exit.USAGE, "kind= and detect= alone"),
])  # fmt: skip
def test_mistakes_are_told(run, files, photo, args, code, said):
    Image.fromarray(canny(photo)[:48]).save(files / "wide.canny.png")
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(files / "empty.canny.png")
    Image.fromarray(draw([standing()], (128, 96))).save(files / "plain.pose.png")
    (files / "none.jsonl").write_text("")
    found, _, err = run("score", *(a.format(f=files) for a in args))
    assert found == code and said in err and "hint:" in err


def test_the_best_of_several_images_are_kept(run, small_base_folder, tmp_path, monkeypatch):
    """The kept ones are those with the highest scores of all, and say so; the others are not written."""
    monkeypatch.chdir(tmp_path)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    Image.fromarray(lines).save("map.canny.png")
    job = ("generate", "--base", small_base_folder / "base", "--cond", f"map.canny.png,net={small_base_folder}/net",
           "-p", "a red cube", "--steps", 1, "--seed", 1, "--num", 4)  # fmt: skip
    assert run(*job, "-o", "all/")[0] == 0
    scores = {p.name: told(run, p)[0]["f1_near"] for p in sorted((tmp_path / "all").iterdir())}
    code, out, err = run(*job, "--keep-best", 2, "-o", "best/", "--json")
    assert code == 0, err
    rows = {row["output"].split("/")[1]: row["score"] for row in map(json.loads, out.splitlines())}
    assert rows.keys() == {p.name for p in (tmp_path / "best").iterdir()} and len(rows) == 2
    assert sorted(rows.values()) == pytest.approx(sorted(scores.values())[-2:], abs=1e-4)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    photo.save("photo.png")
    made = (
        "generate",
        "--base",
        small_base_folder / "base",
        "--cond",
        f"photo.png,detect=canny,net={small_base_folder}/net",
    )
    assert run(*made, "-p", "x", "--steps", 1, "--seed", 1, "-o", "of-photo.png")[0] == 0
    run("detect", "canny", "photo.png")
    (again,), (own,) = told(run, "of-photo.png"), told(run, "of-photo.png", "--cond", "photo.canny.png")
    assert again["f1"] == own["f1"] and again["kind"] == "canny"  # the photo's map, not the photo
    Image.new("RGB", (64, 64)).save("flat.canny.png")
    lines = [{"cond": f"{c}.canny.png,net={small_base_folder}/net", "prompt": "x", "seed": i, "num": 2, "out": f"o{i}/"}
             for i, c in enumerate(("map", "flat", "map"))]  # fmt: skip
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = run(
        "generate", "--base", small_base_folder / "base", "--jobs", "jobs.jsonl", "--keep-best", 1, "--steps", 1
    )
    assert batch[0] == Exit.PARTIAL and "line 2: flat.canny.png: one flat colour" in batch[2]
    assert [len(list((tmp_path / f"o{i}").glob("*.png"))) for i in (0, 2)] == [1, 1]
    for flags, said in ((("--keep-best", 5), "of 4 images"), (("--keep-best", 0), "of 4 images"),
                        (("--keep-best", 1, "--skip-existing"), "--skip-existing")):  # fmt: skip
        code, _, err = run(*job, *flags, "-o", "no/")
        assert code == Exit.USAGE and said in err
    code, _, err = run("generate", "--base", small_base_folder / "base", "-p", "x", "--num", 2, "--keep-best", 1)
    assert code == Exit.USAGE and "no condition" in err and not (tmp_path / "no").exists()


def test_a_map_that_is_another_one_now_or_gone_is_told(run, small_base_folder, files, monkeypatch):
    monkeypatch.chdir(files)
    job = ("generate", "--base", small_base_folder / "base", "--cond", f"photo.canny.png,net={small_base_folder}/net")
    assert run(*job, "-p", "x", "--steps", 1, "--seed", 1, "--size", "128x96", "-o", "made/a.png")[0] == 0
    assert "is not the file" not in run("score", "made/a.png")[2]
    assert run("detect", "canny", "other.png", "--size", "128x96", "-o", "photo.canny.png", "--overwrite")[0] == 0
    code, _, err = run("score", "made/a.png")
    assert code == 0 and "warning: photo.canny.png: is not the file that made/a.png was made with" in err
    (files / "photo.canny.png").unlink()
    for name in ("score", "replay"):
        code, _, err = run(name, "made/a.png")
        assert code == Exit.INPUT and f"hint: controlnet {name} made/a.png --cond PATH" in err


@pytest.mark.parametrize("made", ["by detect", "by others"])
def test_a_map_that_was_stretched_is_judged_as_it_acted(run, small_base_folder, tmp_path, photo, monkeypatch, made):
    """Of another aspect than the canvas: the image has the map's lines where the control had them."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    run("detect", "canny", "photo.png", "--size", "128x96", "-o", "map.canny.png")
    if made == "by others":
        Image.open("map.canny.png").save("map.canny.png")  # without its record
    job = ("generate", "--base", small_base_folder / "base", "--cond", f"map.canny.png,net={small_base_folder}/net",
           "-p", "x", "--steps", 1, "--seed", 1, "--size", "128x64")  # fmt: skip
    assert run(*job, "--num", 2, "--keep-best", 1, "-o", "best/")[0] == 0
    assert run(*job, "-o", "one.png")[0] == 0
    record = read_image((tmp_path / "one.png").read_bytes(), "")[1]
    stretched = np.array(Image.fromarray(photo).resize((128, 64)))
    write_file(tmp_path / "kept.png", png_bytes(stretched, record))
    assert told(run, "kept.png")[0]["f1_near"] > 0.6  # its lines are where the canvas had them
    write_file(tmp_path / "moved.png", png_bytes(np.roll(stretched, 12, 1), record))
    assert told(run, "moved.png")[0]["f1_near"] < 0.4


def test_what_a_region_alone_shows_is_scored(run, small_base_folder, tmp_path, photo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[28:68, 44:84] = 255
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(mask).save("mask.png")
    net = f"net={small_base_folder}/net"
    job = ("generate", "--base", small_base_folder / "base", "--init", "photo.png", "--mask", "mask.png",
           "--region-only", "--cond", f"@init,detect=canny,{net}", "-p", "x", "--steps", 2, "--seed", 1)  # fmt: skip
    code, out, err = run(*job, "-o", "a.png", "--json")
    assert code == 0, err
    box = json.loads(out)["conditions"][0]["box"]
    assert len(box) == 4 and 0 <= box[0] < box[2] <= 1
    assert run("replay", "a.png")[1].strip() == "identical"
    record = read_image((tmp_path / "a.png").read_bytes(), "")[1]
    write_file(tmp_path / "same.png", png_bytes(photo, record))  # nothing was changed: all lines are kept
    assert told(run, "same.png")[0]["f1_near"] > 0.95


def test_a_photo_is_brought_to_its_map_as_the_maps_record_says(run, files):
    """The map is a crop of the photo, of another aspect."""
    assert run("detect", "canny", files / "photo.png", "--size", "96", "-o", files / "square.canny.png")[0] == 0
    (own,) = told(run, files / "photo.png", "--cond", files / "square.canny.png")
    assert own["f1"] == 1


@pytest.mark.parametrize("options", [{"nothing": 1}, 5, {"low": "x"}, [1]])
def test_a_record_with_options_that_are_none(run, files, options):
    image, text = read_image((files / "photo.canny.png").read_bytes(), "x")
    fields = json.loads(text["controlnet"]) | {"options": options}
    write_file(files / "photo.canny.png", png_bytes(image, dump(fields)))
    code, out, err = run("score", files / "photo.png", "--cond", files / "photo.canny.png")
    assert (code, out) == (Exit.INPUT, "") and "options that opencv does not know" in err
