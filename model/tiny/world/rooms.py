"""Textured rooms to learn depth from: the world's bodies, with more walls, furniture and clutter, any camera and light.

The figures of `scenes.py` are easy to tell from their floors; those in a photo are not. Here every surface may carry a
texture from a photograph or a pattern, at any scale, so that depth shows only in shape, not in colour.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.tiny.world.people import POSES, body_parts, pose_joints
from controlnet.model.tiny.world.render import Hits, per_scene, trace
from controlnet.model.tiny.world.scenes import SHAPES, Body, Camera, Scene, Surface
from torch import Tensor

PICTURES = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "camera.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "page.png", "retina.jpg", "rocket.jpg", "text.png", "moon.png",
)  # fmt: skip
"""Public-domain pictures that come with scikit-image."""
_PLAIN = Surface("", (0.5, 0.5, 0.5))
_TEXELS = 256


class _Room:
    """A room while it is furnished: its bodies, and the generator that everything is drawn from."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng([7, seed])
        self.bodies: list[Body] = []
        self.deep, self.wide, self.high = (self.rng.uniform(*span) for span in ((1.5, 9.0), (1.0, 4.5), (2.2, 3.6)))

    def add(self, shape: str, a, b=(0.0, 0.0, 0.0), radius: float = 0.0, yaw: float = 0.0) -> None:
        (ax, ay, az), (bx, by, bz) = map(float, a), map(float, b)
        self.bodies.append(Body(shape, (ax, ay, az), (bx, by, bz), float(radius), float(yaw), _PLAIN, 0))

    def thing(self, x: float, y: float, z: float, s: float) -> None:
        """A body of about `s` metres standing at height y."""
        rng = self.rng
        shape, tall = str(rng.choice([*SHAPES, "capsule"])), rng.uniform(0.5, 2.2)
        if shape == "sphere":
            self.add(shape, (x, y + s, z), radius=s)
        elif shape == "cube":
            half = s * rng.uniform(0.4, 1.2, 3)
            self.add(shape, (x, y + half[1], z), half, yaw=rng.uniform(0, np.pi))
        elif shape == "capsule":
            end = rng.normal(0, s, 3)
            self.add(shape, (x, y + s, z), (x + end[0], y + s + abs(end[1]), z + end[2]), s * rng.uniform(0.2, 0.6))
        else:
            self.add(shape, (x, y, z), (s * rng.uniform(0.4, 0.9), s * tall, 0))

    def walls(self) -> None:
        """Side walls and a ceiling, some of them missing."""
        rng, high, deep = self.rng, self.high, self.deep
        for side in (-1, 1):
            if rng.random() < 0.55:
                centre, half = (side * (self.wide + 0.1), high / 2, deep / 2 - 2), (0.1, high / 2, deep / 2 + 4)
                self.add("cube", centre, half, yaw=rng.normal(0, 0.08))
        if rng.random() < 0.45:
            self.add("cube", (0, high + 0.1, deep / 2 - 2), (self.wide + 3, 0.1, deep / 2 + 4))

    def table(self) -> tuple[float, float, float]:
        """A top on four legs, or a block, with things on it; returns the middle of its top."""
        rng = self.rng
        x, y, z = rng.uniform(-0.6, 0.6), rng.uniform(0.35, 0.95), rng.uniform(-0.4, min(1.5, self.deep - 0.8))
        half, yaw = np.array([rng.uniform(0.4, 1.2), 0.03, rng.uniform(0.25, 0.7)]), rng.normal(0, 0.5)
        if rng.random() < 0.4:
            self.add("cube", (x, y / 2, z), (half[0], y / 2, half[2]), yaw=yaw)
        else:
            self.add("cube", (x, y, z), half, yaw=yaw)
            c, s = np.cos(yaw), np.sin(yaw)
            for i, k in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
                u, w = i * half[0] * 0.9, k * half[2] * 0.9
                self.add("cylinder", (x + c * u + s * w, 0, z - s * u + c * w), (0.03, y, 0))
        for _ in range(int(rng.integers(1, 6))):
            u, w = rng.uniform(-0.7, 0.7) * half[0], rng.uniform(-0.6, 0.6) * half[2]
            self.thing(x + u, y + 0.03, z + w, rng.uniform(0.04, 0.2))
        return x, y, z

    def clutter(self) -> None:
        """Things on the floor, and cupboards against the back wall."""
        rng = self.rng
        for _ in range(int(rng.integers(0, 7))):
            self.thing(rng.uniform(-self.wide, self.wide), 0, rng.uniform(-1.0, self.deep), rng.uniform(0.1, 0.7))
        if rng.random() < 0.3:
            for x in np.arange(-self.wide, self.wide, 0.8):
                if rng.random() < 0.5:
                    tall = rng.uniform(0.4, 2.2)
                    self.add("cube", (x, tall / 2, self.deep - 0.3), (0.38, tall / 2, 0.3))

    def person(self) -> None:
        rng = self.rng
        pose = str(rng.choice(list(POSES)))
        joints, turn = pose_joints(pose, bool(rng.random() < 0.5), rng), rng.uniform(-np.pi, np.pi)
        c, s = np.cos(turn), np.sin(turn)
        about = np.array([[c, 0, s], [0, 1, 0], [s, 0, -c]])
        at = np.array([rng.uniform(-1, 1), 0, rng.uniform(-0.8, max(0.0, self.deep - 1))])
        for _, a, b, radius in body_parts(joints=joints):
            self.add("capsule", a @ about + at, b @ about + at, radius)

    def camera(self, table: tuple[float, float, float] | None) -> Camera:
        """Within the room, looking at the table or the middle, mostly a little down."""
        rng = self.rng
        tilt, distance = np.radians(rng.normal(12, 14)), rng.uniform(1.2, 4.0)
        at_table = table is not None and rng.random() < 0.6
        aim = np.array(table if at_table else (rng.uniform(-0.5, 0.5), rng.uniform(0.2, 1.4), 0.5))
        if table is not None and rng.random() < 0.5:
            distance *= 0.5
        turn = rng.normal(0, 0.5)
        back = np.array([np.sin(turn) * np.cos(tilt), np.sin(tilt), -np.cos(turn) * np.cos(tilt)])
        x, y, z = aim + distance * back
        x, y = np.clip(x, -self.wide * 0.9, self.wide * 0.9), np.clip(y, 0.15, self.high - 0.2)
        roll, fov = rng.normal(0, 0.05), np.radians(rng.uniform(35, 75))
        tx, ty, tz = aim.tolist()
        return Camera((float(x), float(y), float(z)), (tx, ty, tz), float(roll), float(fov))


def make_room(seed: int) -> Scene:
    """The room of a seed. Its surfaces have no colours yet; `draw_rooms` gives them theirs."""
    room = _Room(seed)
    rng = room.rng
    room.walls()
    table = room.table() if rng.random() < 0.5 else None
    room.clutter()
    if rng.random() < 0.3:
        room.person()
    camera = room.camera(table)
    light = np.array([rng.uniform(-1, 1), rng.uniform(0.3, 1.0), rng.uniform(-1.0, 0.3)])
    x, y, z = (light / np.linalg.norm(light)).tolist()
    return Scene(
        "room",
        "",
        floor=_PLAIN,
        wall=_PLAIN,
        wall_at=float(room.deep),
        wall_turn=float(rng.normal(0, 0.25)),
        light=(x, y, z),
        ambient=float(rng.uniform(0.35, 0.95)),
        camera=camera,
        bodies=tuple(body for body in room.bodies if not _holds(body, np.array(camera.eye))),
    )


def _holds(body: Body, eye: np.ndarray, gap: float = 0.25) -> bool:
    """Whether the camera is in the body, or closer to it than `gap`."""
    a, b = np.array(body.a), np.array(body.b)
    if body.shape == "cube":
        c, s = np.cos(body.yaw), np.sin(body.yaw)
        x, y, z = eye - a
        return bool((np.abs([c * x - s * z, y, s * x + c * z]) < b + gap).all())
    if body.shape == "sphere":
        return bool(np.linalg.norm(eye - a) < body.radius + gap)
    if body.shape == "capsule":
        along = np.clip((eye - a) @ (b - a) / ((b - a) @ (b - a) + 1e-9), 0, 1)
        return bool(np.linalg.norm(eye - a - along * (b - a)) < body.radius + gap)
    return bool(np.hypot(*(eye - a)[[0, 2]]) < b[0] + gap and -gap < eye[1] - a[1] < b[1] + gap)


@cache
def _textures() -> list[Tensor]:
    """The pictures and patterns as a pyramid: level l is (T, S, S, 3) float in [0, 1], S = _TEXELS / 2^l."""
    import skimage.data
    from PIL import Image

    folder = Path(skimage.data.__file__).parent
    tiles = []
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            side = min(picture.size)
            square = picture.convert("RGB").crop((0, 0, side, side)).resize((_TEXELS, _TEXELS))
            tiles.append(np.asarray(square, np.float32) / 255)
    rng = np.random.default_rng(0)
    at = np.arange(_TEXELS)
    for cells in (2, 4, 8, 16):
        stripes = np.repeat(((at // (_TEXELS // cells)) % 2)[:, None], _TEXELS, 1)
        for mask in (stripes, stripes ^ stripes.T):
            one, two = rng.uniform(0.1, 0.95, (2, 3))
            tiles.append(np.where(mask[..., None], one, two).astype(np.float32))
    for coarse in (4, 8, 16, 32, 64, 256):
        noise = torch.from_numpy(rng.uniform(0.1, 0.9, (1, 3, coarse, coarse)).astype(np.float32))
        cloud = F.interpolate(noise, size=(_TEXELS, _TEXELS), mode="bicubic", align_corners=False)
        tiles.append(cloud[0].permute(1, 2, 0).clamp(0, 1).numpy())
    pyramid = [torch.from_numpy(np.stack(tiles))]
    while pyramid[-1].shape[1] > 4:
        pyramid.append(F.avg_pool2d(pyramid[-1].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
    return pyramid


def draw_rooms(seeds: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, size, size, 3) uint8 and depth (B, size, size), metres along the view axis, of the rooms."""
    scenes = [make_room(seed) for seed in seeds]
    hits = trace(scenes, size)
    # Surfaces of a scene: its bodies by their rows, then the floor, then the wall.
    first = torch.tensor([sum(len(s.bodies) for s in scenes[:i]) for i in range(len(scenes))])
    count = torch.tensor([len(s.bodies) for s in scenes])
    surface = torch.where(hits.row >= 0, hits.row - first[:, None], count[:, None] - 1 - hits.row)
    colours = torch.stack([_paint(hits, i, surface[i], int(count[i]) + 2, seeds[i], size) for i in range(len(scenes))])
    ambient = per_scene(scenes, lambda s: (s.ambient,), "cpu")
    shaded = colours * (ambient + (1 - ambient) * hits.light[..., None])
    images = (shaded.clamp(0, 1) * 255).round().to(torch.uint8).reshape(len(scenes), size, size, 3)
    return images, hits.depth.reshape(len(scenes), size, size)


def _paint(hits: Hits, scene: int, surface: Tensor, surfaces: int, seed: int, size: int) -> Tensor:
    """Colours (K, 3) of one scene: each surface is plain or textured; a texture is laid on along the axis nearest to
    the surface's normal."""
    rng = np.random.default_rng([8, seed])
    pyramid = _textures()

    def table(values) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32))[surface]

    texture = torch.from_numpy(rng.integers(len(pyramid[0]), size=surfaces))[surface]
    strength = table(np.where(rng.random(surfaces) < 0.35, 0, rng.uniform(0.3, 1.0, surfaces)))
    tint = table(rng.uniform(0.15, 1.0, (surfaces, 1)) * rng.uniform(0.6, 1.0, (surfaces, 3)))
    metres = table(np.exp(rng.uniform(np.log(0.25), np.log(4.0), surfaces)))
    angle, shift = table(rng.choice([0.0, 0.0, 0.4, 0.8], surfaces)), table(rng.uniform(0, 1, (surfaces, 2)))
    p, normal = hits.points[scene], hits.normals[scene].abs()
    axis = normal.argmax(-1)
    others = torch.tensor([[2, 1], [0, 2], [0, 1]])[axis]
    u, v = p.gather(1, others).unbind(1)
    turned = torch.stack([angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u], 1)
    uv = turned / metres[:, None] + shift
    # The pixel's footprint on the surface decides the level of the pyramid, as in any renderer.
    facing = normal.gather(1, axis[:, None])[:, 0].clamp(min=0.2)
    texels = hits.distance[scene] * (1.0 / size) / facing / metres * _TEXELS
    level = texels.clamp(min=1).log2().round().long().clamp(max=len(pyramid) - 1)
    colour = torch.empty(len(p), 3)
    for k in level.unique().tolist():
        here = level == k
        side = pyramid[k].shape[1]
        row, column = (uv[here] * side).floor().long().remainder(side).unbind(1)
        colour[here] = pyramid[k][texture[here], row, column]
    return tint * (1 - strength[:, None] + strength[:, None] * 1.6 * colour)
