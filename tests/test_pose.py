"""Poses of photos: found by BlazePose, told as key points, drawn again from them."""

import json
from pathlib import Path

import numpy as np
import pytest
from controlnet.preprocessors.detectors.blazepose import BlazePoseOptions, _same, _squares, find_people
from controlnet.preprocessors.detectors.pose import PoseOptions, blazepose
from controlnet.preprocessors.errors import Exit, InputError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.geometry import fit, window
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.keypoints import from_json, to_json
from controlnet.preprocessors.metadata import load
from controlnet.preprocessors.skeleton import JOINTS, draw
from helpers import run
from hypothesis import given
from hypothesis import strategies as st

KEPT = Path.home() / ".cache/controlnet/weights/blazepose"
SKIER = Path(__file__).parents[2] / "shared/assets/photos/coco_000000000785_ccby2.jpg"
needs_weights = pytest.mark.skipif(not KEPT.is_dir(), reason="controlnet models pull blazepose has not been run")
SIGMAS = dict(zip(
    ("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
     "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
     "right ankle"),
    np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000, strict=True,
))  # fmt: skip
"""COCO's tolerance of each joint."""


@pytest.fixture(scope="module")
def astronaut():
    """A public-domain photo of a person (512, 512, 3)."""
    import skimage.data

    return skimage.data.astronaut()


def at(person, name):
    return person[JOINTS.index(name)]


@needs_weights
def test_a_person_is_found_where_she_is(astronaut):
    (person,) = find_people(astronaut, BlazePoseOptions(), KEPT)
    for name, x, y in (("nose", 0.43, 0.25), ("right eye", 0.38, 0.22), ("left eye", 0.47, 0.21)):
        assert np.hypot(*(at(person, name)[:2] - (x, y))) < 0.04 and at(person, name)[2] > 0.9, name
    assert at(person, "right shoulder")[0] < at(person, "left shoulder")[0]  # she looks at us
    assert np.allclose(at(person, "neck")[:2], (at(person, "right shoulder") + at(person, "left shoulder"))[:2] / 2)
    assert at(person, "left ankle")[2] == 0  # not in the picture


@needs_weights
def test_two_people_are_found_and_none_where_there_is_none(astronaut):
    two = np.concatenate([astronaut, astronaut[:, ::-1]], 1)
    people = find_people(two, BlazePoseOptions(), KEPT)
    assert len(people) == 2 and sorted(round(float(at(p, "nose")[0]), 1) for p in people) == [0.2, 0.8]
    assert len(find_people(two, BlazePoseOptions(people=1), KEPT)) == 1
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    assert find_people(noise, BlazePoseOptions(), KEPT) == []


@needs_weights
@pytest.mark.skipif(not SKIER.is_file(), reason="the photo is not in the repository")
def test_the_skier_of_coco():
    """COCO's own key points of image 785, in pixels; OKS counts every joint that COCO marks."""
    true = json.loads((SKIER.parents[1] / "people/coco/test_coco.json").read_text())
    told = next(a for a in true["annotations"] if a["image_id"] == 785)
    points = np.array(told["keypoints"]).reshape(17, 3)
    image, _ = read_image(SKIER.read_bytes(), "skier")
    (person,) = find_people(image, BlazePoseOptions(), KEPT)
    scores = []
    for name, (x, y, marked) in zip(SIGMAS, points, strict=True):
        mine = at(person, name)
        distance = ((mine[:2] * image.shape[1::-1] - (x, y)) ** 2).sum()
        if marked:
            scores.append((mine[2] > 0) * np.exp(-distance / (2 * told["area"] * (2 * SIGMAS[name]) ** 2)))
    assert np.mean(scores) >= 0.85


@needs_weights
def test_the_command_writes_map_and_key_points_and_draws_them_again(astronaut, tmp_path, capsys):
    write_file(tmp_path / "a.png", png_bytes(astronaut))
    points = tmp_path / "points.json"
    common = ("--weights", KEPT, "--offline")
    assert run("detect", "pose", tmp_path / "a.png", "--size", "384", "--keypoints", points, *common) == 0
    assert capsys.readouterr() == (f"{tmp_path}/a.pose.png\n", "")
    map_, text = read_image((tmp_path / "a.pose.png").read_bytes(), "map")
    people = [np.array(person) for person in load(text)["keypoints"]]
    assert len(people) == 1 and np.array_equal(map_, draw(people, (384, 384)))
    assert run("detect", "pose", points, "--size", "384", *common) == 0
    again, _ = read_image((tmp_path / "points.pose.png").read_bytes(), "map")
    assert np.mean(again != map_) < 0.002  # the file has thousandths of pixels
    assert run("detect", "pose", points, "--size", "384", "--keypoints", points, "--overwrite", *common) == 0
    assert len(from_json(points.read_bytes(), "")[0]) == 1


@needs_weights
def test_nobody_has_an_exit_code_of_its_own(tmp_path, capsys):
    write_file(tmp_path / "wall.png", png_bytes(np.full((64, 64, 3), 90, np.uint8)))
    command = ("detect", "pose", tmp_path / "wall.png", "--weights", KEPT)
    assert run(*command) == Exit.NOTHING
    err = capsys.readouterr().err
    assert "wall.png: nobody found" in err and "--allow-empty" in err
    assert not (tmp_path / "wall.pose.png").exists()
    assert run(*command, "--allow-empty") == 0
    assert not read_image((tmp_path / "wall.pose.png").read_bytes(), "")[0].any()


def test_one_person_seen_twice_is_one():
    rng = np.random.default_rng(0)
    person = np.column_stack([rng.uniform(0.2, 0.8, (18, 2)), np.ones(18)])
    near = person + [0.01, 0.01, 0]
    far = person + [0.3, 0, 0]
    assert _same(person, near, (100, 100)) and not _same(person, far, (100, 100))


@given(st.integers(8, 5000), st.integers(8, 5000))
def test_squares_cover_the_photo(width, height):
    squares = _squares(width, height)
    assert squares[0][2] == max(width, height) and len(squares) < 4000 / 8 * max(width / height, height / width)
    for side in {s[2] for s in squares[1:]}:
        own = [(x, y) for x, y, s in squares[1:] if s == side]
        assert min(x for x, _ in own) == min(y for _, y in own) == 0
        assert max(x for x, _ in own) + side == pytest.approx(width)
        assert max(y for _, y in own) + side == pytest.approx(height)


@given(
    st.tuples(st.integers(16, 300), st.integers(16, 300)), st.sampled_from([(64, 64), (128, 72), (72, 160)]),
    st.sampled_from(["crop", "pad", "stretch", "keep"]),
)  # fmt: skip
def test_window_is_what_fit_shows(photo, size, resize):
    """A bright spot lands where the window says."""
    left, top, width, height, size = window(photo, size, resize)
    image = np.zeros((photo[1], photo[0], 3), np.uint8)
    image[photo[1] // 2 - 3 : photo[1] // 2 + 3, photo[0] // 2 - 3 : photo[0] // 2 + 3] = 255
    out = fit(image, size, resize)
    assert out.shape[1::-1] == size
    y, x = np.argwhere(out[..., 0] > 100).mean(0) + 0.5
    for found, centre, start, part, side, other in (
        (x, photo[0] // 2, left, width, size[0], photo[0]), (y, photo[1] // 2, top, height, size[1], photo[1]),
    ):  # fmt: skip
        assert abs(found - (centre / other - start) / part * side) <= 1 + side / part / other


def file_of(numbers, side=64):
    people = [{"pose_keypoints_2d": numbers}] if numbers is not None else []
    return json.dumps({"people": people, "canvas_width": side, "canvas_height": side})


@pytest.mark.parametrize("text, told", [
    ("{}", "not OpenPose's JSON"), ("[1]", "not OpenPose's JSON"), ("nonsense", "not OpenPose's JSON"),
    (file_of(["x"] * 54), "not OpenPose's JSON"), (file_of(None, side=0), "at least 8"), (file_of([1, 2]), "2 numbers"),
    (file_of([float("nan")] * 54), "NaN or infinite"), (file_of([900] * 54), "far outside"),
])  # fmt: skip
def test_wrong_key_point_files_are_refused(text, told):
    with pytest.raises(InputError, match=told):
        from_json(text.encode(), "points.json")


@pytest.mark.parametrize("text", ['{"people": [], "canvas_width": 1e999, "canvas_height": 9}', "[" * 100_000])
def test_numbers_and_nesting_that_break_readers(text):
    with pytest.raises(InputError, match="not OpenPose's JSON"):
        from_json(text.encode(), "points.json")


def test_openposes_own_files():
    """25 joints and no canvas: pixels of the size that is asked for, the feet and the middle of the hips left out."""
    row = [n for joint in range(25) for n in (joint, 2 * joint, 0.5)]
    people, canvas = from_json(json.dumps({"people": [{"pose_keypoints_2d": row}]}).encode(), "x", (64, 128))
    assert canvas == (64, 128)
    assert (people[0][:, 0] * 64).round().tolist() == [*range(8), *range(9, 19)]
    with pytest.raises(InputError, match="canvas 0x0"):
        from_json(b'{"people": []}', "x")


def test_key_points_are_drawn_without_weights_and_nobody_is_told(run, tmp_path):
    (tmp_path / "a.json").write_text(file_of([10.0, 10.0, 1.0] * 18))
    assert run("detect", "pose", tmp_path / "a.json", "--offline")[0] == 0
    (tmp_path / "none.json").write_text('{"people": [], "canvas_width": 64, "canvas_height": 64}')
    code, _, err = run("detect", "pose", tmp_path / "none.json")
    assert code == Exit.NOTHING and "nobody in it" in err and not (tmp_path / "none.pose.png").exists()
    assert run("detect", "pose", tmp_path / "none.json", "--allow-empty")[0] == 0


def test_json_keeps_people():
    rng = np.random.default_rng(0)
    person = np.column_stack([rng.random((18, 2)), rng.choice([0, 0.5, 1], 18)])
    ((again,), size) = from_json(to_json([person.tolist()], (640, 480)), "")
    known = person[:, 2] > 0
    assert size == (640, 480) and np.allclose(again[known], person[known], atol=1e-4)
    assert np.array_equal(again[:, 2] > 0, known)


@pytest.mark.parametrize("wrong", [{"people": 0}, {"confidence": 2}, {"visibility": -1}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        BlazePoseOptions(**wrong)


@needs_weights
def test_what_a_portrait_does_not_show_is_not_drawn(astronaut):
    """BlazePose guesses hips and legs below the border."""
    guessed = find_people(astronaut, PoseOptions(), KEPT)[0]
    assert (guessed[:, 1] > 1).any() and (guessed[guessed[:, 1] > 1, 2] > 0.3).any()
    _, found = blazepose(astronaut, PoseOptions(), KEPT)
    person = np.array(found["keypoints"][0])
    known = person[:, 2] > 0
    assert ((person[known, :2] >= 0) & (person[known, :2] <= 1)).all() and known.sum() >= 11
    assert not known[[JOINTS.index(f"{side} {part}") for side in ("left", "right") for part in ("knee", "ankle")]].any()
