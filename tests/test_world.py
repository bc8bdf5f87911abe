"""The procedural world: reproducible, exact, and mirrored as a mirror does."""

import json

import numpy as np
import pytest
import torch
from controlnet.model.tiny import conditions
from controlnet.model.tiny.world import render as render_module
from controlnet.model.tiny.world.people import FLIPPED, JOINTS, POSES, pose_joints
from controlnet.model.tiny.world.render import FLOOR, MAIN, OTHER, POSTER, WALL, per_scene, render, trace
from controlnet.model.tiny.world.scenes import Body, Camera, Scene, Surface, make_scene, vary
from controlnet.model.tiny.world.shards import draw_shard, world
from hypothesis import given, settings
from hypothesis import strategies as st

GREY = Surface("grey", (0.5, 0.5, 0.5))
RED = Surface("red", (0.8, 0.1, 0.1))


def room(*bodies, light=(0.0, 1.0, 0.0)):
    """A camera at (0, 1, -4) looking straight ahead, a wall at z = 2."""
    camera = Camera((0.0, 1.0, -4.0), (0.0, 1.0, 0.0), 0.0, float(np.radians(60)))
    return Scene("objects", "", floor=GREY, wall=GREY, wall_at=2.0, light=light, ambient=0.4, camera=camera,
                 bodies=bodies, main=RED)  # fmt: skip


def body(shape, a, b=(0.0, 0.0, 0.0), radius=0.0, part=0, surface=RED):
    return Body(shape, a, b, radius, 0.0, surface, part)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40))
def test_a_seed_fixes_the_scene(seed):
    one, two = make_scene(seed), make_scene(seed)
    assert one == two and one.digest() == two.digest()
    assert make_scene(seed + 1).digest() != one.digest()
    json.loads(json.dumps(one.digest()))


# Depth at the middle of the picture: the camera is at z = -4 and looks along z at height 1.
MIDDLE = {
    "wall": (room(), 6.0, WALL),
    "sphere": (room(body("sphere", (0.0, 1.0, 0.0), radius=0.5)), 3.5, MAIN),
    "cube": (room(body("cube", (0.0, 1.0, 0.0), (0.3, 0.4, 0.5))), 3.5, MAIN),
    "cylinder": (room(body("cylinder", (0.0, 0.0, 0.0), (0.5, 2.0, 0.0))), 3.5, MAIN),
    "cone": (room(body("cone", (0.0, 0.0, 0.0), (0.5, 2.0, 0.0), part=1)), 3.75, OTHER),
    "capsule": (room(body("capsule", (0.0, 0.5, 0.0), (0.0, 1.5, 0.0), 0.25)), 3.75, MAIN),
    "nearest of two": (
        room(body("sphere", (0.0, 1.0, 1.0), radius=0.5), body("sphere", (0.0, 1.0, 0.0), radius=0.2, part=1)),
        3.8,
        OTHER,
    ),
}


@pytest.mark.parametrize("name", MIDDLE)
def test_depth_is_exact(name):
    scene, depth, part = MIDDLE[name]
    seen = render([scene], 64)
    assert seen.depth[0, 32, 32] == pytest.approx(depth, abs=0.03)
    assert seen.parts[0, 32, 32] == part


def test_floor_depth_and_shadow():
    """At 60 degrees of view the bottom edge looks 30 degrees down: it meets the floor at 1 / tan(30) along z. A light
    from straight above puts the shadow right below the ball."""
    ball = body("sphere", (0.0, 1.5, 0.0), radius=0.4)
    seen = render([room(ball), room()], 128)
    sample = (2 * 127 + 0.5) / 256 * 2 - 1  # the upper of the last row's two samples
    assert seen.depth[0, 127, 5] == pytest.approx(1 / np.tan(np.radians(30)) / sample, rel=1e-4)
    assert seen.parts[0, 127, 64] == FLOOR and seen.parts[0, 64, 2] == WALL
    row = 64 + round(64 * (1 / 4) / np.tan(np.radians(30)))  # the floor point below the ball
    lit, dark = seen.images[1, row, 64, 0].item(), seen.images[0, row, 64, 0].item()
    assert lit == 128 and dark == 51  # ambient 0.4 of 0.5


def test_captions_tell_what_is_there():
    for seed in range(60):
        scene = make_scene(seed)
        if scene.sort == "poster":
            assert scene.layers[0].surface.name in scene.caption
        else:
            assert f"{scene.floor.name} floor" in scene.caption and f"{scene.wall.name} wall" in scene.caption
            assert scene.main.name in scene.caption


def test_people_stand_in_the_picture_and_their_left_is_on_the_right():
    people = [s for s in map(make_scene, range(300)) if s.sort == "person"][:60]
    seen = render(people, 64)
    joints = seen.joints.numpy()
    assert (joints[..., 2].mean(1) > 0.9).mean() > 0.9
    height = np.ptp(joints[..., 1], axis=1) / 64
    assert np.median(height) > 0.5
    left, right = (joints[:, JOINTS.index(f"{s}_shoulder"), 0] for s in "lr")
    assert (left > right).all()  # they face the camera
    assert all(MAIN in seen.parts[i] for i in range(len(people)))


def test_waving_side_is_the_pictures():
    waving = [s for s in map(make_scene, range(1500)) if " waving on the " in s.caption]
    assert len(waving) > 10
    for scene, joints in zip(waving, render(waving, 32).joints.numpy(), strict=True):
        wrists = {side: joints[JOINTS.index(f"{side}_wrist")] for side in "lr"}
        raised = min(wrists.values(), key=lambda j: j[1])
        other = max(wrists.values(), key=lambda j: j[1])
        assert (f"on the {'left' if raised[0] < other[0] else 'right'} in a") in scene.caption


@pytest.mark.parametrize("pose", POSES)
def test_poses_touch_the_ground_with_bones_of_fixed_length(pose):
    rng = np.random.default_rng(0)
    for _ in range(20):
        joints = pose_joints(pose, bool(rng.integers(2)), rng)
        assert joints.shape == (18, 3)
        assert joints[[9, 10, 12, 13], 1].min() == pytest.approx(0.22 if pose == "jumping" else 0.09)
        for a, b, length in (("r_shoulder", "r_elbow", 0.30), ("l_knee", "l_ankle", 0.43)):
            assert np.linalg.norm(joints[JOINTS.index(a)] - joints[JOINTS.index(b)]) == pytest.approx(length)


def test_the_main_region_is_the_main_objects():
    channel = {"red": 0, "green": 1, "blue": 2}
    scenes = [s for s in map(make_scene, range(900)) if s.sort == "objects" and s.main.name in channel]
    scenes = [s for s in scenes if len(s.bodies) > 1]
    assert len(scenes) > 25
    seen = render(scenes, 32)
    for scene, image, parts in zip(scenes, seen.images.float(), seen.parts, strict=True):
        if (parts == MAIN).sum() > 10:
            assert int(image[parts == MAIN].mean(0).argmax()) == channel[scene.main.name], scene.caption


def test_flips():
    assert sorted(FLIPPED) == list(range(18))
    assert [JOINTS[i] for i in FLIPPED][:5] == ["nose", "neck", "l_shoulder", "l_elbow", "l_wrist"]


def test_other_words_keep_the_rest():
    rng = np.random.default_rng(0)
    told = "a person waving in a grey shirt, purple floor"
    assert vary(told, rng, chance=0.0) == told
    varied = vary(told, rng, chance=1.0)
    assert varied.endswith("floor") is False and "person" not in varied and varied.startswith("a ")
    assert len(varied.split()) == len(told.split()) and varied.count(",") == 1


def test_posters_fill_the_picture():
    posters = [s for s in map(make_scene, range(80)) if s.sort == "poster"]
    seen = render(posters, 32)
    assert (seen.parts == POSTER).all() and (seen.depth < 2.2).all()
    assert not seen.joints.any()


def test_shards_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr("controlnet.model.tiny.world.shards.SHARD", 5)
    torch.manual_seed(0)
    (tmp_path / "v1-16").mkdir()
    for first in (0, 5):
        draw_shard(tmp_path / "v1-16" / f"{first:08d}.npz", first, 16)
    data = world(tmp_path, 8, 16)
    assert data.images.shape == (8, 16, 16, 3) and data.joints.shape == (8, 18, 3)
    assert data.captions == [make_scene(i).caption for i in range(8)]
    again = render([make_scene(6)], 16)
    assert np.array_equal(data.images[6], again.images[0].numpy())


def test_scenes_are_the_same_one_by_one_and_together():
    """On a GPU the rays of all are traced at once."""
    scenes = [s for s in map(make_scene, range(30)) if s.sort != "poster"][:6]
    bodies = render_module._Bodies(scenes, "cpu")
    hits = trace(scenes, 24)
    origins = per_scene(scenes, lambda s: s.camera.eye, "cpu").expand_as(hits.points).contiguous()
    rays = (hits.points - origins) / hits.distance[..., None]
    alone = render_module._nearest(bodies, origins, rays)
    together = render_module._first_of(bodies, 0, origins, rays)
    assert (alone[0] < 100).any()
    assert (alone[1] == together[1]).float().mean() > 0.999  # but where two bodies meet to a rounding
    torch.testing.assert_close(alone[0], together[0])


def test_maps_are_drawn_once_by_the_functions_of_their_kinds(tmp_path):
    """Two of each scene, by worker processes, as each function draws them for its scene and round."""
    data = world(tmp_path / "world", 250, 32, report=lambda text: None)
    rows = conditions.scenes_of("pose", data)
    assert 40 < len(rows) < 130 and data.joints[rows, :, 2].any(1).all()
    for kind in ("canny", "pose"):
        chosen = conditions.scenes_of(kind, data)
        maps = conditions.drawn(kind, data, tmp_path / "world", tmp_path / f"{kind}.npy", lambda text: None)
        for k, place in ((0, 0), (1, 7)):
            row = chosen[place]
            expected = conditions.CONDITIONS[kind](data, row, np.random.default_rng([7, k, row]))
            assert (maps[k, place] == expected[..., : maps.shape[-1]]).all() and maps[k, place].any()
    few = data.only(np.arange(20))
    with pytest.raises(ValueError, match="holds maps of 250 scenes, expected 20"):
        conditions.drawn("canny", few, tmp_path / "world", tmp_path / "canny.npy")
