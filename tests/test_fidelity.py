"""The measures of control: closed-form cases, and each kind's own scene scores near 1."""

import numpy as np
import pytest
import torch
from controlnet.model.tiny.card import Colours, crossing_limbs
from controlnet.model.tiny.readers import JointReader, PartReader, measures, pose_of
from controlnet.model.tiny.world.render import FLOOR, MAIN, render
from controlnet.model.tiny.world.scenes import make_scene
from controlnet.model.tiny.world.shards import HELD_OUT, World
from controlnet.preprocessors.agreement import edge_f1, pck, rank_correlation
from controlnet.preprocessors.skeleton import crossing
from hypothesis import given
from hypothesis import strategies as st


def test_edge_f1_in_closed_form():
    a, b = np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)
    a[10], b[11] = 255, 255
    assert edge_f1(a, a, 0) == pytest.approx(1) and edge_f1(a, b, 0) == 0 and edge_f1(a, b, 1) == pytest.approx(1)
    b[20] = 255  # half of b has no partner in a
    assert edge_f1(a, b, 1) == pytest.approx(2 / 3)
    empty = np.zeros_like(a)
    assert edge_f1(empty, empty, 1) == 1 and edge_f1(empty, a, 1) == 0


def test_pck_in_closed_form():
    true = np.zeros((18, 3))
    true[:, 1], true[:, 2] = np.linspace(0, 100, 18), 1  # a figure 100 high: 10 is just near enough
    found = true[:, :2].copy()
    found[:9, 0], found[9:, 0] = 9.9, 10.1
    assert pck(found, true) == 0.5
    true[9:, 2] = 0  # what is not seen does not count, nor does it make the figure longer
    found[:9, 0] = np.array([4.6, 4.8] * 4 + [4.6])
    assert np.ptp(true[:9, 1]) == pytest.approx(800 / 17) and pck(found, true) == pytest.approx(5 / 9)
    assert pck(found, true, among=np.arange(18) < 2) == 0.5  # the length is still that of the whole figure


def test_joints_of_limbs_that_cross_are_judged_alone():
    """What is missed of other limbs does not count, nor do people without any."""
    straight = np.ones((18, 3))
    straight[:, :2] = np.stack([100 * np.arange(18), np.arange(18) ** 2], 1)
    crossed = straight.copy()
    crossed[[1, 8], :2], crossed[[5, 6, 7], :2] = [(50, 0), (50, 100)], [(100, 0), (100, 50), (0, 50)]
    among, people = crossing(crossed), np.stack([straight, crossed])
    assert not crossing(straight).any() and among[6:8].all() and not among[:5].any()
    found = people[..., :2].copy()
    found[1, ~among] += 1e5
    assert crossing_limbs(found, people) == {"people": 1, "pck": [1.0, 1.0, 1.0]}
    found[1, 7] += 1e5
    assert crossing_limbs(found, people)["pck"][0] == pytest.approx(1 - 1 / among.sum(), abs=1e-4)


@given(st.floats(0.1, 5), st.floats(-3, 3))
def test_rank_correlation_knows_no_scale(a, b):
    x = np.random.default_rng(0).uniform(-1, 1, (8, 9))
    assert rank_correlation(x, np.exp(a * x + b)) == pytest.approx(1) and rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, np.zeros((8, 9))) == 0


def test_joints_are_read_at_the_peaks_of_their_heat_maps():
    """A network of one blob a joint: the peak of 64 x 64 is told in pixels of the picture, between them if need be."""
    at = np.random.default_rng(0).uniform(10, 118, (18, 2))

    class Blobs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
            squared = [(2 * columns - cx) ** 2 + (2 * rows - cy) ** 2 for cx, cy in at]
            return -torch.stack(squared).expand(len(x), -1, -1, -1) / 12

    found = JointReader(Blobs()).read(np.zeros((3, 128, 128, 3), np.uint8), batch=2)
    assert found.shape == (3, 18, 2) and np.abs(found - at).max() < 0.3


def test_a_scene_itself_scores_best():
    scenes = [make_scene(seed) for seed in range(9)]
    drawn = render(scenes, 128)
    world = World(drawn.images.numpy(), drawn.depth.numpy(), drawn.parts.numpy(), drawn.joints.numpy(), [])

    class Knows(JointReader):
        def __init__(self):
            pass

        def read(self, images, batch=50):
            rows = [np.abs(world.images.astype(int) - image).sum((1, 2, 3)).argmin() for image in images]
            return world.joints[rows, :, :2]

    for measure in measures(Knows()):
        rows = measure.rows(world)
        assert len(rows) >= 2, measure.kind
        conditions = [measure.condition(world, row) for row in rows]
        assert all(c.shape == (128, 128, 3) and c.dtype == np.uint8 for c in conditions)
        true = np.mean(measure.scores(world.images[rows], world, rows, conditions))
        other = np.mean(measure.scores(world.images[rows], world, np.roll(rows, 1), conditions[-1:] + conditions[:-1]))
        assert true > 0.95 and true > other + 0.2, (measure.kind, true, other)


def test_a_pose_condition_lies_on_its_person():
    scene = next(s for s in map(make_scene, range(99)) if s.sort == "person")
    drawn = render([scene], 128)
    map_ = pose_of(drawn.joints[0].numpy(), 128)
    lines = map_.max(2) > 60
    assert lines.sum() > 100 and (drawn.parts[0].numpy()[lines] > 1).mean() > 0.85  # on a body, not on floor or wall


def test_parts_that_a_network_marks_are_where_colours_are_read():
    """Parts told on every second pixel; an image that lacks its main object has the wrong colour there."""
    drawn = render([make_scene(HELD_OUT + i) for i in range(6)], 128)
    world = World(*(a.numpy() for a in (drawn.images, drawn.depth, drawn.parts, drawn.joints)), [])

    class Marks(torch.nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.weight, self.parts = torch.nn.Parameter(torch.zeros(1)), parts

        def forward(self, x):
            return torch.nn.functional.one_hot(self.parts[:, ::2, ::2].long(), 5).permute(0, 3, 1, 2).float()

    colours, rows = Colours(world, range(HELD_OUT, HELD_OUT + 6)), np.arange(6)
    found = PartReader(Marks(drawn.parts)).read(world.images)
    assert found.shape == (6, 128, 128) and (found == world.parts).mean() > 0.95
    known, marked = (colours.accuracy(world.images, world, rows, parts) for parts in (None, found))
    assert {k: v[0] for k, v in marked.items()} == {k: v[0] for k, v in known.items()}
    without = PartReader(Marks(drawn.parts.where(drawn.parts != MAIN, FLOOR))).read(world.images)
    assert colours.accuracy(world.images, world, rows, without)["main"][0] == 0 < known["main"][0]
