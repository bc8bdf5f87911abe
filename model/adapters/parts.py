"""The networks of a base that adapters change, and their modules by name; and a copy of a base that shares all tensors
but those that are changed. So no adapter ever writes into a base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from controlnet.model.base import Base
from controlnet.model.files import names
from controlnet.model.files.families import family_by_width
from controlnet.preprocessors.errors import ModelError
from torch import Tensor, nn


def file_in(path: Path, names: Sequence[str]) -> Path:
    """The file of an adapter: the path itself, or of a folder the one with one of these names, else its only
    .safetensors. Raises ModelError if there is none."""
    if not path.is_dir():
        return path
    known = [path / name for name in names if (path / name).is_file()]
    alone = sorted(path.glob("*.safetensors"))
    if not known and len(alone) != 1:
        raise ModelError(f"{path}: {len(alone)} .safetensors files, expected one, or {names[0]}", f"ls {path}")
    return (known or alone)[0]


class Parts:
    """UNet and text encoders of a base by the names of diffusers' folders."""

    NAMES: ClassVar = ("unet", "text_encoder", "text_encoder_2")

    def __init__(self, base: Base):
        encoders = {encoder.part: encoder.network for encoder in base.encoders}
        self.networks: dict[str, nn.Module] = {"unet": base.unet, **encoders}
        self.width = base.unet.config.cross_attention_dim
        self._names = {part: _names(network, part) for part, network in self.networks.items()}

    def module_named(self, part: str, name: str) -> str | None:
        """The module that a file means by a name, with dots or underscores, in diffusers' words or the original's."""
        flat = name.replace(".", "_").removeprefix("text_model_")
        return self._names.get(part, {}).get(flat)

    def module(self, part: str, name: str) -> nn.Module:
        return self.networks[part].get_submodule(name)

    def weight(self, part: str, name: str) -> Tensor:
        weight = self.module(part, name).weight
        assert isinstance(weight, Tensor)
        return weight

    def families_of(self, module: str, shape: tuple[int, int] | None) -> str:
        """` (SDXL, the base is SD 1.x)`, where a module that reads the text tells it by its width."""
        if shape is None or not module.endswith(("attn2.to_k", "attn2.to_v")) or shape[1] == self.width:
            return ""
        known = (family_by_width(width, added) for width in (shape[1], self.width) for added in (False, True))
        found = [family.name for family in known if family]
        return f" ({found[0]}, the base is {found[1]})" if len(found) == 2 else f" (for texts of width {shape[1]})"


def _names(network: nn.Module, part: str) -> dict[str, str]:
    """A network's modules with weights, by their flat names in either layout."""
    found = {}
    originals = names.reverse(names.unet(network.config)) if part == "unet" else {}  # type: ignore[arg-type]
    for name, module in network.named_modules():
        if not isinstance(getattr(module, "weight", None), Tensor):
            continue
        found[name.replace(".", "_").removeprefix("text_model_")] = name
        if original := names.renamed(name, originals):
            found[original.replace(".", "_")] = name
    return found


def with_tensors(base: Base, changed: Mapping[str, Mapping[str, Tensor]]) -> Base:
    """A base with other tensors in some parts, by part and parameter; it shares all others with `base`, which stays as
    it is."""
    encoders = [replace(one, network=_copy(one.network, changed.get(one.part, {}))) for one in base.encoders]
    return replace(base, unet=_copy(base.unet, changed.get("unet", {})), encoders=encoders)


def _copy(network: Any, changed: Mapping[str, Tensor]) -> Any:
    """A network with some parameters replaced. Its other tensors are the same objects."""
    if not changed:
        return network
    tensors = [*network.parameters(), *network.buffers()]
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    for name, tensor in changed.items():
        owner, _, own = name.rpartition(".")
        setattr(twin.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))
    return twin


def laid_out_as(tensor: Tensor, owner: Tensor) -> Tensor:
    """A tensor in the type, on the device and with the layout in memory of another one of its shape."""
    return torch.empty_like(owner).copy_(tensor)
