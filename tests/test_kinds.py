"""The table of kinds: what ControlNets are sold for can be made, doubted, mirrored and scored, or says why not; and the
maps that need no network."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from controlnet.model.registry import NETS
from controlnet.model.sampling.canvas import to_canvas
from controlnet.preprocessors import palette
from controlnet.preprocessors.condition import Condition, read_condition
from controlnet.preprocessors.data.mirror import flip_condition
from controlnet.preprocessors.detectors import drawing, pictures
from controlnet.preprocessors.detectors.registry import DETECTORS, find_detector
from controlnet.preprocessors.doubts import doubts
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.kinds import KINDS, PEOPLE
from controlnet.preprocessors.stage_one import stage_one
from helpers import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_skeleton import standing

SOLD = sorted({kind for net in NETS.values() for kind in net.kinds})


@pytest.fixture(scope="module")
def room():
    """A photo (H, W, 3) with edges, colours and a smooth part."""
    image = np.full((96, 128, 3), (200, 180, 140), np.uint8)
    cv2.rectangle(image, (20, 30), (60, 90), (40, 60, 160), -1)
    cv2.circle(image, (95, 40), 22, (180, 40, 40), -1)
    image[:, 64:] = (image[:, 64:] * np.linspace(0.6, 1, 64)[:, None]).astype(np.uint8)
    return image


@pytest.mark.parametrize("kind", [*SOLD, *(kind for kind in DETECTORS if kind not in SOLD)])
def test_every_kind_is_made_doubted_mirrored_and_scored_or_says_why_not(kind, room, tmp_path):
    assert kind in KINDS
    row = find_detector(kind)
    alone = next((one for one in DETECTORS[kind].values() if not one.weights), None)
    if alone is not None:
        condition = stage_one(room, alone.ready(alone.load_options()()), (128, 96))
        assert condition.size == (128, 96) and condition.kind == kind
        (tmp_path / "map.png").write_bytes(condition.png())
        assert read_condition(str(tmp_path / "map.png")).kind == kind
    else:  # its weights say where they come from
        assert row.weights
        people = [standing()] if KINDS[kind].form == PEOPLE else None
        condition = Condition(room, kind, people=people)
    assert isinstance(doubts(condition.rgb, kind, (128, 96)), list)
    twice = flip_condition(flip_condition(condition))
    assert twice.map.shape == condition.map.shape
    if condition.people is None:
        assert (twice.map == condition.map).all()
    if KINDS[kind].score is None:
        Image.fromarray(room).save(tmp_path / "image.png")
        name = tmp_path / f"x.{kind}.png"
        Image.fromarray(condition.rgb).save(name)
        assert run("score", tmp_path / "image.png", "--cond", name) != 0


def test_kinds_without_a_score_say_so(room, tmp_path, capsys):
    for name in ("image.png", "x.tile.png"):
        Image.fromarray(room).save(tmp_path / name)
    assert run("score", tmp_path / "image.png", "--cond", tmp_path / "x.tile.png") != 0
    told = capsys.readouterr().err
    assert "tile" in told and "hint" in told


def test_tiles_lose_details_and_keep_colours(room):
    assert pictures.tile(room) is room
    coarse = pictures.tile(room, pictures.TileOptions(8))
    assert coarse.shape == room.shape and np.abs(coarse.mean((0, 1)) - room.mean((0, 1))).max() < 2
    steps = [np.abs(np.diff(image.astype(int), axis=1)).max() for image in (room, coarse)]
    assert steps[1] < 0.6 * steps[0]


@given(seed=st.integers(0, 9), flow=st.integers(8, 64))
def test_shuffling_moves_colours_and_makes_none(seed, flow):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :, 0] = np.arange(64) * 4
    image[:, :, 1] = np.arange(48)[:, None] * 5
    options = pictures.ShuffleOptions(flow, seed)
    made = pictures.shuffle(image, options)
    assert made.shape == image.shape and not made[..., 2].any()
    assert (made == pictures.shuffle(image, options)).all()
    assert (made != pictures.shuffle(image, replace(options, seed=seed + 1))).any()
    assert np.ptp(made[..., 0]) > 240 and np.ptp(made[..., 1]) > 220  # all of the photo is used


def test_shuffling_is_controlnet_auxs_with_the_same_noise(room, monkeypatch):
    from controlnet.preprocessors.detectors.controlnet_aux import _bare

    noise = np.random.default_rng(5)
    with _bare("controlnet_aux"):
        from controlnet_aux.shuffle import ContentShuffleDetector

    monkeypatch.setattr("numpy.random.uniform", lambda low, high, size: noise.random(size[:2], np.float32)[..., None])
    expected = ContentShuffleDetector()(
        cv2.resize(room, (128, 128)), f=32, detect_resolution=128, image_resolution=128, output_type="np"
    )
    made = pictures.shuffle(cv2.resize(room, (128, 128)), pictures.ShuffleOptions(32, 5))
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_what_is_hidden_is_transparent(room, tmp_path):
    made = pictures.inpaint(room, pictures.InpaintOptions(box="0,0.5,0.25,1"))
    assert made.shape == (96, 128, 4) and (made[..., :3] == room).all()
    assert (made[48:, :32, 3] == 0).all() and (made[..., 3] == 0).sum() == 48 * 32
    # A mask is brought to the map's size as the photo is: cropped to its middle.
    Image.fromarray(room).save(tmp_path / "room.png")
    mask = np.zeros((96, 128), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run("detect", "inpaint", tmp_path / "room.png", "--mask", tmp_path / "mask.png", "--size", "64") == 0
    alpha = np.asarray(Image.open(tmp_path / "room.inpaint.png"))[..., 3]
    assert alpha.shape == (64, 64) and (alpha[:, :31] == 255).all() and (alpha[:, 33:] == 0).all()
    # Of half the size it is the same mask; of another shape it is refused; a changed one is another map.
    command = ("detect", "inpaint", tmp_path / "room.png", "--mask", tmp_path / "mask.png", "--size", "64")
    assert run(*command, "--skip-existing") == 0
    Image.fromarray(mask[::2, ::2]).save(tmp_path / "mask.png")
    before = alpha
    assert run(*command, "--skip-existing") == 0
    alpha = np.asarray(Image.open(tmp_path / "room.inpaint.png"))[..., 3]
    assert (alpha != before).mean() < 0.05
    Image.fromarray(255 - mask).save(tmp_path / "mask.png")
    assert run(*command, "--skip-existing") == 0
    assert (np.asarray(Image.open(tmp_path / "room.inpaint.png"))[..., 3] != before).mean() > 0.9
    Image.fromarray(np.dstack([mask, mask, mask, mask])).save(tmp_path / "mask.png")  # white, and nothing elsewhere
    assert run(*command, "--overwrite", "--resize", "keep") == 0
    assert np.asarray(Image.open(tmp_path / "room.inpaint.png"))[:, :60, 3].all()
    Image.fromarray(mask[:, :40]).save(tmp_path / "mask.png")
    assert run(*command, "--overwrite") == 3
    Image.fromarray(0 * mask).save(tmp_path / "mask.png")
    assert run(*command, "--overwrite") == 3  # nothing is hidden
    assert run("detect", "inpaint", tmp_path / "room.png", "--mask", tmp_path / "none.png", "--overwrite") == 3


def test_grey_is_lightness_or_the_strongest_channel(room):
    from skimage.color import rgb2lab

    lightness = rgb2lab(room)[..., 0] * 2.55
    assert np.abs(pictures.luminance(room) - lightness).max() < 2
    assert (pictures.intensity(room) == room.max(2)).all()
    darker = pictures.intensity(room, pictures.RecolorOptions(2.0))
    assert np.abs(darker - (room.max(2) / 255) ** 2 * 255).max() <= 0.5


def test_drawings_become_light_on_black():
    sheet = np.full((64, 64, 3), 255, np.uint8)
    cv2.line(sheet, (5, 5), (60, 50), (0, 0, 0), 2)
    made = drawing.invert(sheet)
    assert made[0, 63] == 0 and made[5, 5] == 255 and not doubts(np.repeat(made[..., None], 3, 2), "invert")
    strokes = drawing.scribble(sheet)
    assert set(np.unique(strokes)) == {0, 255} and strokes[5, 5] == 255 and strokes[0, 63] == 0
    assert not drawing.scribble(np.full((32, 32, 3), 90, np.uint8)).any()


def test_colours_of_a_palette_are_not_mixed():
    classes = np.random.default_rng(0).integers(0, 150, (9, 11))
    map_ = cv2.resize(palette.coloured(classes), (176, 144), interpolation=cv2.INTER_NEAREST)
    for size in ((64, 64), (352, 200)):
        assert not palette.nearest(to_canvas(map_, "seg", size))[1].any()
    found, far = palette.nearest(palette.coloured(classes))
    assert (palette.coloured(found) == palette.coloured(classes)).all() and not far.any()
    off = palette.coloured(classes).astype(int) + 3
    assert (palette.nearest(off.clip(0, 255).astype(np.uint8))[1] <= 3).all()


@pytest.mark.parametrize("make", [
    lambda: pictures.TileOptions(0.5), lambda: pictures.ShuffleOptions(flow=1), lambda: pictures.BlurOptions(0),
    lambda: pictures.RecolorOptions(0), lambda: pictures.ShuffleOptions(seed=-1),
    lambda: pictures.InpaintOptions(box="0,0,1"),
    lambda: pictures.InpaintOptions(box="0.5,0,0.2,1"), lambda: drawing.ScribbleOptions(0),
])  # fmt: skip
def test_options_out_of_range_are_refused(make):
    with pytest.raises(UsageError) as error:
        make()
    assert error.value.hint


def test_nothing_of_these_imports_torch():
    from test_libraries import python

    names = [row.name for kind in DETECTORS for row in DETECTORS[kind].values() if not row.weights]
    assert len(names) >= 12
    code = """
import sys, numpy as np
from controlnet.preprocessors.detectors.registry import DETECTORS
image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
for rows in DETECTORS.values():
    for row in rows.values():
        if not row.weights:
            row.ready(row.load_options()())(image)
print("torch" in sys.modules)
"""
    assert python(code).strip() == "False"
