"""Rooms to learn depth from: reproducible, exact, and whatever is done to their pictures is done to their depth."""

import numpy as np
import pytest
import torch
from controlnet.model.tiny.depth import loss_of_batch, main, vary
from controlnet.model.tiny.world.rooms import draw_rooms, make_room
from controlnet.preprocessors.detectors.tiny_depth import STRIDE, Dense, load, nearness
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40))
def test_a_seed_fixes_the_room_and_nothing_is_in_the_cameras_way(seed):
    room = make_room(seed)
    assert room == make_room(seed) != make_room(seed + 1)
    _, depth = draw_rooms([seed], 16)
    assert depth.min() > 0.05


def test_a_room_is_the_same_alone_and_in_company():
    images, depth = draw_rooms([3, 4, 5], 48)
    image, one = draw_rooms([4], 48)
    assert torch.equal(images[1], image[0]) and torch.equal(depth[1], one[0])
    assert images[0].float().std() > 5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_depth_follows_its_picture(seed):
    """A picture whose brightness is its depth: cut, mirrored and in any light, both still rise the same way."""
    y, x = np.mgrid[0:64, 0:64].astype(np.float32)
    depth = 1 + (3 * x + y) / 64
    image = np.repeat((depth * 40).astype(np.uint8)[..., None], 3, 2)
    light, moved = vary(image, depth, np.random.default_rng(seed))
    assert light.shape == (64, 64, 3) and moved.shape == (64, 64)
    inner = light[8:-8, 8:-8].mean(2).ravel(), moved[8:-8, 8:-8].ravel()
    assert np.corrcoef(*inner)[0, 1] > 0.5


def test_the_loss_knows_no_scale():
    depth = torch.rand(2, 32, 32) + 0.5
    assert loss_of_batch(-depth.log() + torch.tensor([3.0, -1.0])[:, None, None], depth) < 1e-6
    assert loss_of_batch(depth.log(), depth) > 0.2


def test_the_network_halves_its_picture_and_learns():
    torch.manual_seed(0)
    network = Dense(3)
    assert network(torch.rand(2, 3, STRIDE, 2 * STRIDE)).shape == (2, 3, STRIDE // 2, STRIDE)
    network(torch.rand(1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_training_writes_what_the_detector_loads(tmp_path):
    main(["--minutes", "0.02", "--rooms", "8", "--scenes", "0", "--size", "32", "--runs", str(tmp_path / "runs"),
          "--out", str(tmp_path / "out")])  # fmt: skip
    found = nearness(load(tmp_path / "out"), np.zeros((40, 70, 3), np.uint8))
    assert found.shape == (40, 70) and 0 < found.max() <= 1
