"""People of the procedural world: named poses on OpenPose's 18 joints, and the capsules of a body.

A person stands in a frame of their own: x to the person's **left**, y up, z forward (where the face looks); metres.
Independent of cameras, colours and pictures.
"""

from __future__ import annotations

import numpy as np

JOINTS = (
    "nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist", "r_hip", "r_knee",
    "r_ankle", "l_hip", "l_knee", "l_ankle", "r_eye", "l_eye", "r_ear", "l_ear",
)  # fmt: skip
"""OpenPose's 18 body joints in its order."""

FLIPPED = tuple(JOINTS.index({"r": "l", "l": "r"}[n[0]] + n[1:] if n[1] == "_" else n) for n in JOINTS)
"""Index of each joint's mirror image: `joints[FLIPPED]` after a horizontal flip."""

# A limb is two angles (degrees) for each of its upper and lower part: `out`, from straight down sideways away from the
# body, and `fwd`, the swing to the front. Order: right arm, left arm, right leg, left leg.
_DOWN, _LEG = ((10, 0), (6, 8)), ((4, 0), (3, -2))
POSES: dict[str, tuple] = {
    "standing": (_DOWN, _DOWN, _LEG, _LEG),
    "waving": (((95, 0), (165, 5)), _DOWN, _LEG, _LEG),
    "with arms up": (((155, 0), (168, 0)), ((155, 0), (168, 0)), _LEG, _LEG),
    "with arms out": (((88, 0), (88, 0)), ((88, 0), (88, 0)), _LEG, _LEG),
    "walking": (((8, -28), (6, -8)), ((8, 28), (6, 42)), ((4, 26), (3, 10)), ((4, -22), (3, -42))),
    "running": (((10, -50), (8, 35)), ((10, 40), (8, 105)), ((4, 55), (3, -25)), ((4, -25), (3, -75))),
    "kneeling": (_DOWN, _DOWN, ((5, 78), (3, 2)), ((5, 5), (3, -85))),
    "with hands on hips": (((42, -15), (-38, 22)), ((42, -15), (-38, 22)), _LEG, _LEG),
    "pointing": (((84, 0), (84, 0)), _DOWN, _LEG, _LEG),
    "with legs apart": (((35, 0), (32, 0)), ((35, 0), (32, 0)), ((24, 0), (22, 0)), ((24, 0), (22, 0))),
    "jumping": (((130, 0), (145, 0)), ((130, 0), (145, 0)), ((28, 12), (18, -40)), ((28, 12), (18, -40))),
    "posing": (((60, 10), (80, 30)), ((60, 10), (80, 30)), ((14, 8), (8, -10)), ((14, 8), (8, -10))),
}
_JITTER = {"posing": 38.0}
ONE_SIDED = ("waving", "pointing")
"""Poses in which one arm acts: the caption names it, and a flip swaps it."""

_UPPER_ARM, _LOWER_ARM, _THIGH, _SHIN = 0.30, 0.27, 0.43, 0.43


def _direction(angles: np.ndarray, side: float) -> np.ndarray:
    """Unit vector of a limb part; angles are (out, fwd) in degrees, side is +1 for the person's left."""
    a, f = np.radians(angles)
    return np.array([side * np.sin(a), -np.cos(a) * np.cos(f), np.cos(a) * np.sin(f)])


def pose_joints(pose: str, acting_left: bool, rng: np.random.Generator) -> np.ndarray:
    """3-D joints `(18, 3)` of a named pose with random variation; the lowest knee or ankle is at y = 0.09 (0.22 for a
    jump).

    `acting_left` mirrors the limbs, so that the left arm waves or points and the left leg leads.
    """
    limbs = list(POSES[pose])
    if acting_left:
        limbs = [limbs[1], limbs[0], limbs[3], limbs[2]]
    jitter = _JITTER.get(pose, 7.0)
    r_arm, l_arm, r_leg, l_leg = (np.asarray(limb, float) + rng.normal(0, jitter, (2, 2)) * [1, 0.8] for limb in limbs)

    # From the hips upwards.
    lean = np.radians(rng.normal(0, 3, 2))
    up = np.array([np.sin(lean[0]), 1.0, np.sin(lean[1]) + (0.12 if pose == "running" else 0.0)])
    up /= np.linalg.norm(up)
    joints = {"hips": np.zeros(3)}
    joints["neck"] = 0.50 * up
    head = joints["neck"] + 0.16 * up + [0, 0, 0.02]
    turn = np.radians(rng.normal(0, 14))
    face = np.array([np.sin(turn), 0, np.cos(turn)])
    left = np.array([np.cos(turn), 0, -np.sin(turn)])
    joints["nose"] = head + 0.115 * face

    # Limbs, each joint from the one before.
    for side, name, arm, leg in ((-1, "r", r_arm, r_leg), (1, "l", l_arm, l_leg)):
        joints[f"{name}_shoulder"] = joints["neck"] + [side * 0.185, -0.03, 0]
        joints[f"{name}_elbow"] = joints[f"{name}_shoulder"] + _UPPER_ARM * _direction(arm[0], side)
        joints[f"{name}_wrist"] = joints[f"{name}_elbow"] + _LOWER_ARM * _direction(arm[1], side)
        joints[f"{name}_hip"] = np.array([side * 0.10, -0.02, 0])
        joints[f"{name}_knee"] = joints[f"{name}_hip"] + _THIGH * _direction(leg[0], side)
        joints[f"{name}_ankle"] = joints[f"{name}_knee"] + _SHIN * _direction(leg[1], side)
        joints[f"{name}_eye"] = head + 0.09 * face + side * 0.038 * left + [0, 0.035, 0]
        joints[f"{name}_ear"] = head + side * 0.10 * left

    # Down to the floor.
    array = np.stack([joints[name] for name in JOINTS])
    knee_or_ankle = array[[9, 10, 12, 13], 1].min()
    array[:, 1] += (0.22 if pose == "jumping" else 0.09) - knee_or_ankle
    return array


def body_parts(joints: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray, float]]:
    """Capsules of a body: (surface, end a, end b, radius); surface is skin, hair, shirt, trousers, shoe or eye."""
    j = {name: joints[i] for i, name in enumerate(JOINTS)}
    head = (j["r_ear"] + j["l_ear"]) / 2
    hips = (j["r_hip"] + j["l_hip"]) / 2
    face = (j["nose"] - head) / np.linalg.norm(j["nose"] - head)
    flat = face * [1, 0, 1]
    parts = [
        ("skin", head, head + [0, 0.02, 0], 0.105),
        ("hair", head - 0.035 * face + [0, 0.045, 0], head - 0.03 * face + [0, 0.05, 0], 0.102),
        ("skin", j["nose"], j["nose"] - 0.02 * face, 0.018),
        ("skin", head - [0, 0.05, 0], j["neck"], 0.05),
        ("shirt", j["neck"] * 0.85 + hips * 0.15, hips + [0, 0.06, 0], 0.135),
        ("shirt", j["r_shoulder"], j["l_shoulder"], 0.075),
        ("trousers", j["r_hip"], j["l_hip"], 0.10),
    ]
    for s in "rl":
        parts += [
            ("eye", j[f"{s}_eye"], j[f"{s}_eye"], 0.017),
            ("shirt", j[f"{s}_shoulder"], j[f"{s}_elbow"], 0.056),
            ("skin", j[f"{s}_elbow"], j[f"{s}_wrist"], 0.043),
            ("skin", j[f"{s}_wrist"], j[f"{s}_wrist"] + (j[f"{s}_wrist"] - j[f"{s}_elbow"]) * 0.2, 0.05),
            ("trousers", j[f"{s}_hip"], j[f"{s}_knee"], 0.082),
            ("trousers", j[f"{s}_knee"], j[f"{s}_ankle"], 0.063),
            ("shoe", j[f"{s}_ankle"] - [0, 0.03, 0], j[f"{s}_ankle"] + 0.12 * flat - [0, 0.045, 0], 0.047),
        ]
    return parts
