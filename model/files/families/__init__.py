"""The families of bases, one file each. They are recognised by headers or by a config, never by a name.

To add one: a file here with a `Family`, and its entry in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlnet.model.files.families.family import NONE_IS_ZEROS, VAE, Encoder, Family, scheduler_config
from controlnet.model.files.families.sd1 import SD1
from controlnet.model.files.families.sd2 import SD2
from controlnet.model.files.families.sdxl import REFINER, SDXL

__all__ = [
    "FAMILIES",
    "NONE_IS_ZEROS",
    "SD1",
    "SD2",
    "SDXL",
    "SUPPORTED",
    "VAE",
    "Encoder",
    "Family",
    "family_by_width",
    "family_name",
    "family_of_config",
    "scheduler_config",
]  # fmt: skip

FAMILIES = (SD1, SD2, SDXL, REFINER)
SUPPORTED = tuple(family for family in FAMILIES if family.supported)


def family_by_width(width: Any, added: bool) -> Family | None:
    """The family with text features of this width, with or without an added embedding; None if there is none."""
    return next((family for family in FAMILIES if (family.width, family.added) == (width, added)), None)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a UNet's config, supported or not. An unknown one, such as `tiny`, gets a family with one text
    encoder."""
    width = config.get("cross_attention_dim")
    return family_by_width(width, bool(config.get("addition_embed_type"))) or Family(family_name(config), 0)


def family_name(config: Mapping[str, Any]) -> str:
    """The name of the family of a UNet's or ControlNet's config: SD 1.x, SD 2.x, SDXL, or the width of another."""
    width = config.get("cross_attention_dim")
    family = family_by_width(width, bool(config.get("addition_embed_type")))
    return family.name if family else f"another family (text features of width {width})"
