"""Known models: one row a base, one row a kind of control."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

TINY = Path(__file__).parent / "tiny" / "weights"


@dataclass(frozen=True)
class KnownBase:
    """`source` is a folder or a hub id; `nets` maps a kind to a folder or hub id of its ControlNet."""

    source: str
    licence: str
    nets: dict[str, str] = field(default_factory=dict)
    guidance: float = 7.5


BASES = {
    "tiny": KnownBase(str(TINY), "Apache-2.0", {"canny": str(TINY / "controlnet-canny")}, guidance=4.0),
    "sd15": KnownBase(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M",
        {"canny": "lllyasviel/control_v11p_sd15_canny"},
    ),
}  # fmt: skip
