"""Pose maps: drawn as OpenPose's, drawn again for other sizes, cut and mirrored."""

import warnings

import cv2
import numpy as np
import pytest
from controlnet.preprocessors.errors import InputError
from controlnet.preprocessors.skeleton import (
    COLOURS,
    JOINTS,
    LIMBS,
    crossing,
    cut_people,
    draw,
    from_text,
    mirror,
    to_text,
)
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():  # torch.jit.script is deprecated, says its import
    warnings.simplefilter("ignore")
    from controlnet_aux.open_pose.body import Keypoint
    from controlnet_aux.open_pose.util import draw_bodypose

fractions = st.floats(0.02, 0.98)
persons = st.lists(
    st.tuples(fractions, fractions, st.sampled_from([0.0, 0.4, 1.0])), min_size=18, max_size=18
).map(np.array)  # fmt: skip


def standing():
    """A person in the middle, arms out, seen from the front: the right hand is on the left of the picture."""
    at = {
        "nose": (0.5, 0.2), "neck": (0.5, 0.3), "right shoulder": (0.42, 0.3), "right elbow": (0.3, 0.32),
        "right wrist": (0.2, 0.25), "left shoulder": (0.58, 0.3), "left elbow": (0.7, 0.34), "left wrist": (0.8, 0.5),
        "right hip": (0.45, 0.55), "right knee": (0.44, 0.72), "right ankle": (0.43, 0.9), "left hip": (0.55, 0.55),
        "left knee": (0.56, 0.72), "left ankle": (0.57, 0.9), "right eye": (0.48, 0.18), "left eye": (0.52, 0.18),
        "right ear": (0.46, 0.19), "left ear": (0.54, 0.19),
    }  # fmt: skip
    return np.array([[*at[name], 1.0] for name in JOINTS])


def theirs(people, size):
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    for person in people:
        draw_bodypose(canvas, [Keypoint(x, y) if c > 0 else None for x, y, c in person])
    return canvas


@given(st.lists(persons, max_size=2))
def test_at_512_pixels_it_is_what_controlnet_aux_draws(people):
    assert np.array_equal(draw(people, (640, 512)), theirs(people, (640, 512)))


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (1024, 1024)])
def test_other_sizes_show_the_same_with_lines_that_grow(size):
    reference = theirs([standing()], (512, 512))
    resized = cv2.resize(reference, size, interpolation=cv2.INTER_AREA if size[0] < 512 else cv2.INTER_CUBIC)
    drawn = draw([standing()], size)
    assert drawn.shape == (size[1], size[0], 3)
    assert np.abs(drawn.astype(int) - resized).mean() < 3
    share = [m.mean() for m in (drawn, reference)]
    if size[0] == size[1]:
        assert share[0] == pytest.approx(share[1], rel=0.1)


def test_every_joint_and_limb_has_its_colour():
    drawn = draw([standing()], (512, 512))
    for joint in range(18):
        x, y = (standing()[joint, :2] * 512).astype(int)
        assert tuple(drawn[y, x]) == COLOURS[joint]
    for (a, b), colour in zip(LIMBS[:12], COLOURS, strict=False):
        x, y = (standing()[[a, b], :2].mean(0) * 512).astype(int)
        assert tuple(drawn[y, x]) == tuple(int(c * 0.6) for c in colour)


@given(persons)
def test_mirrored_twice_is_the_same_person(person):
    assert np.allclose(mirror(mirror([person]))[0], person)


def test_the_mirrored_person_has_its_right_hand_on_the_other_side():
    (mirrored,) = mirror([standing()])
    right, left = JOINTS.index("right wrist"), JOINTS.index("left wrist")
    assert np.allclose(mirrored[right, :2], (0.2, 0.5)) and np.allclose(mirrored[left, :2], (0.8, 0.25))
    drawn = draw([mirrored], (512, 512))
    assert tuple(drawn[256, 102]) == COLOURS[right]  # flipping the picture would have left it the left hand's colour
    assert tuple(draw([standing()], (512, 512))[:, ::-1][256, 102]) != COLOURS[right]


def test_a_part_of_the_picture_shows_a_part_of_the_person():
    whole = draw([standing()], (512, 512))
    part = draw(cut_people([standing()], 0.25, 0.25, 0.5, 0.5), (512, 512))
    cut = cv2.resize(whole[128:384, 128:384], (512, 512), interpolation=cv2.INTER_NEAREST)
    assert tuple(part[307, 307]) == tuple(cut[307, 307]) == COLOURS[JOINTS.index("left hip")]


@given(st.lists(persons, max_size=3))
def test_text_keeps_the_people(people):
    found = from_text({"keypoints": to_text(people)}, "x")
    assert len(found) == len(people) and all(np.allclose(a, b, atol=1e-5) for a, b in zip(found, people, strict=True))


@pytest.mark.parametrize("points", [[[[0, 0]] * 18], [[[0, 0, 1]] * 17], [[[0, 0, float("nan")]] * 18], ["x"], 3])
def test_wrong_key_points_are_refused(points):
    with pytest.raises(InputError, match="key points"):
        from_text({"keypoints": points}, "map.png")
    assert from_text({}, "map.png") is None


@pytest.mark.parametrize("turned", [lambda p: p, lambda p: mirror([p])[0]], ids=["as is", "mirrored"])
def test_limbs_that_cross(turned):
    """Nobody's do who stands with arms out; a hand on the other hip crosses the trunk, legs cross each other."""

    def names(person):
        return {JOINTS[i].split()[-1] for i in crossing(turned(person)).nonzero()[0]}

    person = standing()
    assert names(person) == set()
    person[JOINTS.index("left wrist"), :2] = 0.44, 0.45
    assert names(person) == {"elbow", "wrist"}
    person[JOINTS.index("left wrist"), 2] = 0
    assert names(person) == set()  # it is not seen
    person[JOINTS.index("left ankle"), :2] = 0.4, 0.88
    assert names(person) == {"knee", "ankle"}
    assert crossing(turned(person)).sum() == 4
