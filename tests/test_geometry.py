"""The geometry of detect, as properties over sizes."""

import cv2
import numpy as np
import pytest
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.geometry import fit, parse_size, window
from hypothesis import given, settings
from hypothesis import strategies as st

side = st.integers(8, 300)
eighths = st.integers(8, 24).map(lambda n: 8 * n)


@pytest.mark.parametrize(
    "text, size", [("512", (512, 512)), ("768x512", (768, 512)), ("64X8192", (64, 8192)), (" 256 ", (256, 256))]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["500", "0", "-8", "512x", "x512", "512x500", "abc", "", "5.5", "8200", "56", "512x512x3"]
)
def test_bad_sizes(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.hint.startswith("--size ")


@settings(max_examples=60, deadline=None)
@given(side, side, eighths, eighths, st.sampled_from(["crop", "pad", "stretch"]))
def test_the_result_has_the_wanted_size(height, width, w, h, resize):
    assert fit(np.zeros((height, width, 3), np.uint8), (w, h), resize).shape == (h, w, 3)


@settings(max_examples=40, deadline=None)
@given(side, side)
def test_keep_is_a_centre_crop(height, width):
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    kept = fit(image, (512, 512), "keep")
    assert kept.shape[:2] == (height // 8 * 8, width // 8 * 8)
    y, x = (height - kept.shape[0]) // 2, (width - kept.shape[1]) // 2
    assert np.array_equal(kept, image[y : y + kept.shape[0], x : x + kept.shape[1]])


def bars(width, height):
    """Left third red, middle third green, right third blue."""
    image = np.zeros((height, width, 3), np.uint8)
    for i in range(3):
        image[:, i * width // 3 : (i + 1) * width // 3, i] = 255
    return image


def test_crop_keeps_the_aspect_and_the_middle():
    cropped = fit(bars(300, 100), (104, 104), "crop")
    assert (cropped[:, 10:-10] == (0, 255, 0)).all()


def test_pad_shows_everything_on_black():
    padded = fit(bars(300, 100), (96, 96), "pad")
    assert (padded[:30] == 0).all() and (padded[-30:] == 0).all()
    assert [padded[48, x].argmax() for x in (10, 48, 85)] == [0, 1, 2]


def test_stretch_fills():
    stretched = fit(bars(300, 100), (96, 96), "stretch")
    assert [stretched[48, x].argmax() for x in (10, 48, 85)] == [0, 1, 2]
    assert (stretched.max(2) > 100).all()


def test_unknown_word():
    with pytest.raises(UsageError, match="squeeze"):
        fit(bars(30, 30), (64, 64), "squeeze")


def test_enlarging_is_opencvs_lanczos_up_to_rounding():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50, 3), np.uint8)
    expected = cv2.resize(image, (130, 104), interpolation=cv2.INTER_LANCZOS4)
    made = fit(image, (130, 104), "stretch")
    assert made.dtype == np.uint8 and np.abs(made.astype(int) - expected).max() <= 1
    assert np.abs(fit(image[..., 0], (130, 104), "stretch").astype(int) - expected[..., 0]).max() <= 1


@given(*[st.integers(8, 5000)] * 4)
def test_a_crop_shows_no_more_than_the_photo(a, b, c, d):
    """To the last digit: what is recorded of it is read again as a part of the photo."""
    left, top, width, height, _ = window((a, b), (c, d), "crop")
    assert 0 <= left < left + width <= 1 and 0 <= top < top + height <= 1
