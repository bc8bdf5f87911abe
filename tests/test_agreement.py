"""The scores of control: closed forms, and published implementations where there are some."""

import numpy as np
import pytest
from controlnet.preprocessors.agreement import SIGMAS, aligned, depth_rmse, match_people, oks, pck, ssim
from controlnet.preprocessors.skeleton import JOINTS
from hypothesis import given
from hypothesis import strategies as st
from test_skeleton import standing


def person(dx=0.0, dy=0.0, scale=100.0):
    people = standing() * (scale, scale, 1)
    return people + (dx, dy, 0) * (people[:, 2:] > 0)


def test_structural_similarity_is_scikit_images():
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 255, (40, 50), dtype=np.uint8) for _ in range(2))
    assert ssim(a, b) == pytest.approx(structural_similarity(a, b, data_range=255))
    assert ssim(a, a) == pytest.approx(1) and ssim(a[:5, :5], a[:5, :5]) == pytest.approx(1)


@given(st.floats(0.2, 3), st.floats(-50, 50))
def test_depth_knows_neither_scale_nor_shift(scale, shift):
    true = np.linspace(0, 255, 48).reshape(6, 8)
    assert depth_rmse(scale * true + shift, true) == pytest.approx(0, abs=1e-6)
    assert np.allclose(aligned(-true, true), true.mean())  # what is far must not be taken for near
    assert depth_rmse(np.zeros((6, 8)), true) == pytest.approx(true.std())


def test_oks_is_cocos_formula():
    """Every joint off by its own tolerance times sqrt(2 area): exp(-1/4)."""
    true = person()
    area = 5000.0
    off = true.copy()
    for i, name in enumerate(JOINTS):
        off[i, 0] += SIGMAS[name.split()[-1]] * np.sqrt(2 * area)
    assert oks(true, true) == 1
    assert oks(off, true, area) == pytest.approx(np.exp(-0.25))
    hidden = true.copy()
    hidden[:9, 2] = 0  # joints that are not found count nothing
    assert oks(hidden, true) == pytest.approx(0.5) and pck(hidden, true) == pytest.approx(0.5)


def test_oks_is_cocoevals_own():
    """pycocotools' computeOks on 17 joints, where the package is installed."""
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    order = ["nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
             "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee",
             "left ankle", "right ankle"]  # fmt: skip
    true, found = person(), person(4, 3)
    true[JOINTS.index("neck"), 2] = 0
    rows = [np.array([[*p[JOINTS.index(n), :2], 2] for n in order]).ravel().tolist() for p in (true, found)]
    evaluation = cocoeval.COCOeval(iouType="keypoints")
    evaluation._gts[0, 1] = [{"keypoints": rows[0], "area": 4000.0, "bbox": [0, 0, 100, 100], "num_keypoints": 17}]
    evaluation._dts[0, 1] = [{"keypoints": rows[1], "score": 1.0}]
    evaluation.params.useCats, evaluation.params.maxDets = 1, [20]
    assert oks(found, true, 4000.0) == pytest.approx(float(evaluation.computeOks(0, 1)[0, 0]))


def test_people_are_matched_whatever_their_order():
    true = [person(), person(200), person(0, 300)]
    found = [person(203, 1), person(1, 2)]
    assert match_people(found, true) == [(1, 0), (0, 1), (None, 2)]
    assert match_people([], true) == [(None, 0), (None, 1), (None, 2)]
