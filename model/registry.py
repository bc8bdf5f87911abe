"""Known models: one row a base, one row a kind of control."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

TINY = Path(__file__).parent / "tiny" / "weights"
TINY_HINT_WIDTHS = (8, 16, 32, 64)
"""Widths of the hint encoder on `tiny` and other small bases."""


@dataclass(frozen=True)
class KnownBase:
    """`source` is a folder or a hub id; `nets` maps a kind to a folder or hub id of its ControlNet."""

    source: str
    licence: str
    nets: dict[str, str] = field(default_factory=dict)
    guidance: float = 7.5
    training: dict[str, float] = field(default_factory=dict)
    """Where the settings of `controlnet train` differ from the defaults, which suit Stable Diffusion."""


BASES = {
    "tiny": KnownBase(
        str(TINY), "Apache-2.0", {kind: str(TINY / f"controlnet-{kind}") for kind in ("canny", "pose", "depth")},
        guidance=3.0,
        training={"learning_rate": 5e-4, "batch_size": 16, "max_steps": 1500, "validate_every": 50},
    ),
    "sd15": KnownBase(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M",
        {
            "canny": "lllyasviel/control_v11p_sd15_canny", "pose": "lllyasviel/control_v11p_sd15_openpose",
            "depth": "lllyasviel/control_v11f1p_sd15_depth", "normal": "lllyasviel/control_v11p_sd15_normalbae",
            "softedge": "lllyasviel/control_v11p_sd15_softedge", "scribble": "lllyasviel/control_v11p_sd15_scribble",
            "lineart": "lllyasviel/control_v11p_sd15_lineart",
        },
    ),
}  # fmt: skip
