"""A condition on another canvas: lines survive, nothing turns grey, depth stays smooth."""

from types import SimpleNamespace

import numpy as np
import pytest
from controlnet.model.load import load_base
from controlnet.model.sampling.canvas import canvas_size, condition_tensor, to_canvas
from controlnet.preprocessors.data.check import same_aspect
from hypothesis import example, given, settings
from hypothesis import strategies as st

side = st.integers(9, 90)


@settings(max_examples=60, deadline=None)
@given(side, side, side, side, st.integers(0, 2**32 - 1))
def test_lines_stay_lines(height, width, h, w, seed):
    rng = np.random.default_rng(seed)
    lines = np.repeat((rng.random((height, width, 1)) < 0.03).astype(np.uint8) * 255, 3, 2)
    out = to_canvas(lines, "canny", (w, h))
    assert out.shape == (h, w, 3) and out.dtype == np.uint8
    assert set(np.unique(out)) <= {0, 255}
    assert out.any() == lines.any()
    if h <= height and w <= width:  # every lit pixel lights the cell it falls into
        ys, xs = np.nonzero(lines[..., 0])
        assert (out[ys * h // height, xs * w // width] == 255).all()


def test_a_thin_line_survives_shrinking():
    lines = np.zeros((512, 512, 3), np.uint8)
    lines[101] = 255
    out = to_canvas(lines, "canny", (128, 128))
    assert (out[25] == 255).all() and out[..., 0].sum() == 255 * 128


def test_depth_shrinks_by_area():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0), 3, 2)
    out = to_canvas(ramp, "depth", (64, 64))
    assert np.abs(out[0, :, 0] - (np.arange(64) * 4 + 1.5)).max() <= 1


def test_same_size_is_untouched_and_tensor_is_zero_to_one():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert to_canvas(image, "depth", (24, 16)) is image
    tensor = condition_tensor(image)
    assert tensor.shape == (3, 16, 24)
    assert np.array_equal((tensor.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8), image)
    assert tensor.min() >= 0 and tensor.max() <= 1


@pytest.mark.parametrize("condition, canvas", [
    (None, (64, 64)), ((512, 512), (64, 64)), ((768, 512), (96, 64)), ((512, 768), (64, 96)), ((100, 1000), (64, 640)),
])  # fmt: skip
def test_canvas_follows_the_condition(small_base_folder, condition, canvas):
    assert canvas_size(load_base(str(small_base_folder / "base")), condition) == canvas


@given(st.integers(256, 4096), st.floats(0.2, 5))
@example(1060, 1000 / 1060)
@example(1000, 4.5)
def test_a_canvas_of_the_photos_own_aspect(side, aspect):
    """Of a base with trained sizes, for painting in a photo: within the aspect that `check_canvas` asks for."""
    base = SimpleNamespace(native_size=1024, factor=8, sizes=[(1024, 1024), (1216, 832), (768, 1344)])
    size = side, max(1, round(side / aspect))
    width, height = canvas_size(base, size, own_aspect=True)
    assert width % 8 == height % 8 == 0 and same_aspect((width, height), size, tolerance=0.05)
    assert abs(width * height / 1024**2 - 1) < 0.2


@pytest.mark.parametrize("size", [(1920, 820), (600, 1700), (1000, 1000), (1333, 777)])
def test_a_canvas_of_whole_steps_where_there_is_one(size):
    base = SimpleNamespace(native_size=1024, factor=8, sizes=[(1024, 1024), (1216, 832), (768, 1344)])
    assert all(side % 64 == 0 for side in canvas_size(base, size, own_aspect=True))
