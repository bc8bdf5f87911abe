"""What a scene of the procedural world holds: drawn from a seed, described in a caption, hashed by its full
description.

Three sorts: objects on a floor before a wall, people, and posters. Units are metres and radians; x right, y up, z away
from the camera, the floor at y = 0. Independent of pixels (`render.py` draws a scene).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from controlnet.model.tiny.world.people import ONE_SIDED, POSES, body_parts, pose_joints

WORLD_VERSION = 1
"""Part of every scene's seed: raise it when the same seed would give another scene."""

PALETTE = {
    "red": (208, 36, 34), "orange": (236, 124, 22), "yellow": (240, 212, 46), "green": (44, 150, 60),
    "cyan": (40, 190, 204), "blue": (36, 76, 196), "purple": (126, 52, 164), "pink": (240, 150, 182),
    "brown": (118, 74, 42), "black": (30, 30, 32), "grey": (132, 132, 132), "white": (238, 238, 236),
}  # fmt: skip
SKIN = ((236, 196, 166), (198, 144, 104), (118, 78, 54))
HAIR = {"black": (26, 22, 22), "brown": (94, 58, 32), "blond": (222, 188, 106), "red": (168, 74, 36)}
SHAPES = ("sphere", "cube", "cylinder", "cone")
PATTERNS = ("plain", "checkered", "striped")
BOUNDARIES = ("curves", "polygons", "circles", "cells")
SIZES = {"small": (0.16, 0.24), "": (0.28, 0.40), "large": (0.44, 0.62)}


@dataclass(frozen=True)
class Surface:
    """One look: the colour's name, its RGB in [0, 1], and a pattern with a period in metres."""

    name: str
    rgb: tuple[float, float, float]
    pattern: str = "plain"
    period: float = 0.5


@dataclass(frozen=True)
class Body:
    """One primitive. `a` and `b`: centre and half sizes (cube), foot and (radius, height, 0) (cylinder, cone), centre
    (sphere), the two ends (capsule); `part` is the object's number, or 0 for a person's shirt and 100+ for the rest."""

    shape: str
    a: tuple[float, float, float]
    b: tuple[float, float, float]
    radius: float
    yaw: float
    surface: Surface
    part: int


@dataclass(frozen=True)
class Camera:
    eye: tuple[float, float, float]
    target: tuple[float, float, float]
    roll: float
    fov: float
    """Vertical field of view."""


@dataclass(frozen=True)
class Layer:
    """One region of a poster: pixels inside `boundary` get this look. Coordinates are in [-1, 1], y down."""

    boundary: str
    numbers: tuple[float, ...]
    surface: Surface
    shade: tuple[float, float, float]
    """Direction and strength of the brightness gradient."""
    depth: float


@dataclass(frozen=True)
class Scene:
    """A scene's whole description; equal descriptions draw equal pictures."""

    sort: str
    """objects, person or poster."""
    caption: str
    floor: Surface | None = None
    wall: Surface | None = None
    wall_at: float = 0.0
    wall_turn: float = 0.0
    light: tuple[float, float, float] = (0.0, 1.0, 0.0)
    ambient: float = 0.4
    camera: Camera = Camera((0.0, 1.0, -4.0), (0.0, 1.0, 0.0), 0.0, 0.7)
    bodies: tuple[Body, ...] = ()
    main: Surface | None = None
    """The look of the main object, or of the person's shirt."""
    joints: tuple[tuple[float, float, float], ...] = field(default=())
    layers: tuple[Layer, ...] = ()

    def digest(self) -> str:
        """sha256 of the description (not of the pixels)."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def make_scene(seed: int) -> Scene:
    """The scene of a seed: a third objects, a third people, a third posters."""
    rng = np.random.default_rng([WORLD_VERSION, seed])
    return (_objects, _person, _poster)[int(rng.integers(3))](rng)


def _pick(rng: np.random.Generator, options) -> str:
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _look(rng: np.random.Generator, avoid: tuple[str, ...] = (), pattern: str = "plain") -> Surface:
    name = _pick(rng, [c for c in PALETTE if c not in avoid])
    rgb = np.clip(np.asarray(PALETTE[name]) / 255 + rng.normal(0, 0.015, 3), 0, 1)
    return Surface(name, _floats(rgb), pattern, float(rng.uniform(0.35, 0.9)))


def _floats(values) -> tuple:
    return tuple(round(float(v), 4) for v in values)


def _room(rng: np.random.Generator) -> dict:
    floor = _look(rng, pattern=_pick(rng, PATTERNS))
    wall = _look(rng, avoid=(floor.name,))
    light = np.array([rng.uniform(-0.9, 0.9), 1.0, rng.uniform(-1.0, -0.25)])
    return {
        "floor": floor,
        "wall": wall,
        "wall_at": float(rng.uniform(1.2, 3.0)),
        "wall_turn": float(rng.normal(0, 0.07)),
        "light": _floats(light / np.linalg.norm(light)),
        "ambient": float(rng.uniform(0.34, 0.5)),
    }


def _place(rng: np.random.Generator, room: dict) -> str:
    floor = f"{room['floor'].pattern} {room['floor'].name} floor".removeprefix("plain ")
    return f"{floor}, {room['wall'].name} wall" if rng.random() < 0.85 else f"{room['wall'].name} wall, {floor}"


def _object(rng: np.random.Generator, part: int, x: float, z: float, avoid: tuple[str, ...]) -> tuple[Body, str]:
    """A body standing on the floor at (x, z), and its words."""
    shape, size = _pick(rng, SHAPES), _pick(rng, SIZES)
    s = float(rng.uniform(*SIZES[size]))
    look = _look(rng, avoid)
    tall = float(rng.uniform(0.8, 1.9))
    a, b, radius = {
        "sphere": ((x, s, z), (0, 0, 0), s),
        "cube": ((x, s * 0.9, z), (s * 0.9, s * 0.9, s * 0.9), 0.0),
        "cylinder": ((x, 0, z), (s * 0.75, s * tall, 0), 0.0),
        "cone": ((x, 0, z), (s * 0.95, s * (tall + 0.5), 0), 0.0),
    }[shape]
    if shape == "cube" and rng.random() < 0.25:
        shape_word, height = "box", s * float(rng.uniform(1.1, 1.8))
        a, b = (x, height, z), (s * 0.7, height, s * 0.7)
    else:
        shape_word = shape
    body = Body(shape, _floats(a), _floats(b), radius, float(rng.uniform(0, np.pi)), look, part)
    return body, " ".join(w for w in (size, look.name, shape_word) if w)


def _objects(rng: np.random.Generator) -> Scene:
    room = _room(rng)
    count = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.35, 0.25, 0.1]))
    bodies: list[Body] = []
    words: list[str] = []
    while len(bodies) < count:
        x, z = rng.uniform(-1.25, 1.25), rng.uniform(-0.9, 0.9)
        if all(np.hypot(x - b.a[0], z - b.a[2]) > 0.72 for b in bodies):
            body, word = _object(rng, len(bodies), x, z, (room["floor"].name, room["wall"].name))
            bodies.append(body)
            words.append(word)

    # The largest is the main one; the caption names them in this order.
    order = sorted(range(count), key=lambda i: -_extent(bodies[i]))
    bodies = [replace(bodies[i], part=rank) for rank, i in enumerate(order)]
    main = bodies[0]
    words = [f"a {words[i]}" for i in order]
    if count == 2 and abs(bodies[0].a[0] - bodies[1].a[0]) > 0.5 and rng.random() < 0.6:
        side = "left" if main.a[0] < bodies[1].a[0] else "right"
        told = f"{words[0]} on the {side} of {words[1]}"
    elif count == 1 and abs(main.a[0]) > 0.5 and rng.random() < 0.6:
        told = f"{words[0]} on the {'left' if main.a[0] < 0 else 'right'}"
    else:
        told = ", ".join(words[:3]) if count > 2 else " and ".join(words)

    # Seen from somewhere in front.
    distance = rng.uniform(2.6, 4.4)
    turn = rng.normal(0, 0.28)
    eye = (distance * np.sin(turn), rng.uniform(0.7, 2.2), -distance * np.cos(turn))
    camera = Camera(
        _floats(eye),
        _floats((0, rng.uniform(0.2, 0.6), 0)),
        float(rng.normal(0, 0.025)),
        float(np.radians(rng.uniform(34, 46))),
    )
    return Scene(
        "objects", f"{told}, {_place(rng, room)}", bodies=tuple(bodies), main=main.surface, camera=camera, **room
    )


def _extent(body: Body) -> float:
    return max(body.radius, *body.b)


def _portrait(rng: np.random.Generator, joints: np.ndarray, stand: np.ndarray) -> Camera:
    """A camera that sees a whole person (18, 3) who stands somewhere."""
    top, bottom = joints[:, 1].max() + 0.2, min(0.0, joints[:, 1].min() - 0.1)
    fov = float(np.radians(rng.uniform(32, 46)))
    fill = rng.uniform(0.60, 0.92)
    distance = (top - bottom) / (2 * fill * np.tan(fov / 2)) + 0.1
    swing = rng.normal(0, 0.12)
    middle = (top + bottom) / 2
    aim = stand + [rng.uniform(-0.3, 0.3), middle + rng.uniform(-0.5, 0.5) * (1 - fill) * (top - bottom) * 0.8, 0]
    eye = stand + [distance * np.sin(swing), rng.uniform(0.7, 1.7), -distance * np.cos(swing)]
    return Camera(_floats(eye), _floats(aim), float(rng.normal(0, 0.02)), fov)


def _person(rng: np.random.Generator) -> Scene:
    room = _room(rng)
    pose = _pick(rng, POSES)
    acting_left = bool(rng.random() < 0.5)
    joints = pose_joints(pose, acting_left, rng)
    yaw = float(np.clip(rng.normal(0, 0.45), -1.2, 1.2))
    # The person's frame (x left, z forward) is right-handed, the world (x right, z away) left-handed: this turn, its
    # own inverse, makes the face look at the camera and puts the person's left on the picture's right.
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, 0, s], [0, 1, 0], [s, 0, -c]])
    stand = np.array([rng.uniform(-0.35, 0.35), 0, rng.uniform(-0.2, 0.2)])
    shirt, trousers = _look(rng, (room["wall"].name,)), _look(rng, (room["floor"].name, room["wall"].name))
    skin = Surface("skin", _floats(np.asarray(SKIN[int(rng.integers(3))]) / 255))
    hair_name = _pick(rng, HAIR)
    looks = {
        "shirt": shirt,
        "trousers": trousers,
        "skin": skin,
        "hair": Surface(hair_name, _floats(np.asarray(HAIR[hair_name]) / 255)),
        "shoe": Surface("black", (0.13, 0.12, 0.12)),
        "eye": Surface("black", (0.08, 0.07, 0.07)),
    }
    joints = joints @ turn + stand
    bodies = []
    for look, a, b, radius in body_parts(joints=(joints - stand) @ turn):
        part = 0 if look == "shirt" else 100 + list(looks).index(look)
        bodies.append(
            Body("capsule", _floats(a @ turn + stand), _floats(b @ turn + stand), radius, 0.0, looks[look], part)
        )
    words = f"{shirt.name} shirt and {trousers.name} trousers"
    who = f"a person {pose}"
    if pose in ONE_SIDED:
        # A caption speaks of the picture's sides: the person's left arm is on the right.
        who += f" on the {'right' if acting_left else 'left'}"
    if rng.random() < 0.3:
        who = who.replace("a person", f"a person with {hair_name} hair", 1)
    told = f"{who} in a {words}"
    for _ in range(int(rng.choice([0, 1, 2], p=[0.5, 0.4, 0.1]))):
        side = float(rng.choice([-1.0, 1.0]))
        spot = stand + [side * rng.uniform(0.75, 1.15), 0, rng.uniform(-0.3, 0.6)]
        body, word = _object(rng, len(bodies), spot[0], spot[2], (room["floor"].name, room["wall"].name))
        if all(b.part >= 100 or b.part == 0 or abs(b.a[0] - body.a[0]) > 0.8 for b in bodies):
            told += f" {'beside' if ' beside ' not in told else 'and'} a {word}"
            bodies.append(body)
    camera = _portrait(rng, joints, stand)
    return Scene(
        "person",
        f"{told}, {_place(rng, room)}",
        bodies=tuple(bodies),
        main=shirt,
        camera=camera,
        joints=tuple(_floats(j) for j in joints),
        **room,
    )


def _poster(rng: np.random.Generator) -> Scene:
    fill = _pick(rng, ("flat", "shaded", "striped", "mixed"))
    sorts = [_pick(rng, BOUNDARIES)] if rng.random() < 0.5 else list(BOUNDARIES)
    colours = list(rng.permutation(list(PALETTE)))[: int(rng.integers(2, 6))]

    def layer(boundary: str, numbers, depth: float, name: str | None = None) -> Layer:
        name = name or _pick(rng, colours)
        style = _pick(rng, ("flat", "shaded", "striped")) if fill == "mixed" else fill
        rgb = np.clip(np.asarray(PALETTE[name]) / 255 * rng.uniform(0.85, 1.08) + rng.normal(0, 0.03, 3), 0, 1)
        striped = style == "striped" and rng.random() < 0.6
        angle = rng.uniform(0, 2 * np.pi)
        strength = rng.uniform(0.15, 0.55) if style == "shaded" else 0.0
        surface = Surface(name, _floats(rgb), "striped" if striped else "plain", float(rng.uniform(0.12, 0.4)))
        return Layer(boundary, _floats(numbers), surface, _floats((np.cos(angle), np.sin(angle), strength)), depth)

    # The ground, cells over some of it, then shapes, the later ones in front.
    layers = [layer("all", (), 0.1, colours[0])]
    if "cells" in sorts and rng.random() < 0.8:
        points = rng.uniform(-1.1, 1.1, (int(rng.integers(4, 14)), 2))
        for i in range(len(points)):
            layers.append(layer("cells", [i, *points.ravel()], float(rng.uniform(0.1, 0.4))))
    count = int(rng.choice([2, 4, 7, 12, 18]))
    for i in range(count):
        boundary = _pick(rng, [s for s in sorts if s != "cells"] or ["curves"])
        depth = 0.4 + 0.6 * (i + 1) / count
        scale = rng.uniform(0.08, 0.75) if i else 0.9
        if boundary == "curves":
            waves = [
                v for k in (1, 2, 3) for v in (rng.normal(0, 0.28 / k), rng.uniform(0.6, 2.2) * k, rng.uniform(0, 6.3))
            ]
            band = rng.uniform(0.05, 0.3) if rng.random() < 0.5 else 3.0
            numbers = [rng.uniform(0, 6.3), rng.uniform(-0.8, 0.8), band, *waves]
        elif boundary == "circles":
            numbers = [
                *rng.uniform(-1, 1, 2),
                scale * 0.7,
                scale * 0.7 * rng.uniform(0.5, 1.0),
                rng.uniform(0, 3.2),
                rng.choice([0.0, 0.0, rng.uniform(0.5, 0.85)]),
            ]
        else:
            sides = int(rng.integers(3, 8))
            angles = np.sort(rng.uniform(0, 2 * np.pi, sides))
            numbers = [*rng.uniform(-0.9, 0.9, 2), *(v for a in angles for v in (a, scale * rng.uniform(0.45, 1.0)))]
        layers.append(layer(boundary, numbers, round(depth, 4)))

    # The caption: the ground's colour, then those in front.
    named = list(dict.fromkeys([colours[0], *(la.surface.name for la in reversed(layers))]))[:4]
    words = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    kind = sorts[0] if len(sorts) == 1 else "shapes"
    style = "" if fill == "mixed" else f"{fill} "
    return Scene("poster", f"a {style}poster of {kind} in {words}", layers=tuple(layers))


SYNONYMS = {
    "person": ("man", "woman", "figure"), "sphere": ("ball",), "cube": ("block",), "grey": ("gray",),
    "poster": ("painting", "picture"), "trousers": ("pants", "jeans"), "shirt": ("jumper", "top"),
    "wall": ("background",),
    "floor": ("ground",), "cyan": ("turquoise",), "purple": ("violet",), "large": ("big",), "small": ("little",),
    "circles": ("discs",), "curves": ("waves",), "beside": ("near",), "walking": ("striding",), "cells": ("tiles",),
}  # fmt: skip


def vary(caption: str, rng: np.random.Generator, chance: float = 0.25) -> str:
    """The caption in other words: each word that has synonyms becomes one of them with this chance."""
    words = []
    for word in caption.split(" "):
        bare = word.rstrip(",")
        if bare in SYNONYMS and rng.random() < chance:
            word = _pick(rng, SYNONYMS[bare]) + word[len(bare) :]
        words.append(word)
    return " ".join(words)
