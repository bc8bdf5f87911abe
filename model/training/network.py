"""The ControlNet that a run trains: a fresh one of the form that the settings name, or an existing one."""

from __future__ import annotations

from dataclasses import replace

import torch
from controlnet.model.base import Base
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.hint import SD_WIDTHS
from controlnet.model.control.lite import gaussian_convolutions_
from controlnet.model.files import hub
from controlnet.model.nets import NETWORKS, load_controlnet
from controlnet.model.registry import NETS, TINY_HINT_WIDTHS
from controlnet.model.training.config import CHOICES, TrainConfig
from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.kinds import union_kinds


def make_controlnet(base: Base, config: TrainConfig, offline: bool = False) -> tuple[ControlNet, TrainConfig]:
    """A fresh ControlNet of the form that the settings name, or the one in `start_from`; and the settings, changed to
    that one's form. Raises UsageError for settings that contradict it, ModelError for a base that cannot be trained
    on."""
    if base.is_inpainting:
        raise ModelError(
            f"base {base.name}: made for inpainting; expected one that makes images from text", "--base sd15"
        )
    net, config = (_fresh(base, config), config) if config.start_from == "base" else _existing(base, config, offline)
    net = net.to(base.device, torch.float32).requires_grad_(True).to(memory_format=torch.channels_last)
    return net, config


def _fresh(base: Base, config: TrainConfig) -> ControlNet:
    widths = SD_WIDTHS if base.unet.config.block_out_channels[0] >= 128 else TINY_HINT_WIDTHS
    if config.hint == "paper":
        widths = (16, 32, 64, 128)
    try:
        net = NETWORKS[config.copy].from_base(base.unet, config.hint, widths)
    except ValueError as error:
        raise ModelError(
            f"base {base.name}: {error}", "--base sd15, or another of Stable Diffusion 1.x's form"
        ) from error
    return gaussian_convolutions_(net) if config.convolutions == "gaussian" else net


def _existing(base: Base, config: TrainConfig, offline: bool) -> tuple[ControlNet, TrainConfig]:
    known = NETS.get(config.start_from)
    path = hub.find(known.source if known else config.start_from, offline, "--set start_from=DIR")
    net = load_controlnet(path, torch.float32, base.unet.config, base.name)
    if net.types is not None:
        raise ModelError(
            f"{config.start_from}: a union of {', '.join(union_kinds(net.types))}, which is not trained here",
            "--set start_from=DIR of a ControlNet for one kind",
        )
    form = {"hint": net.hint, "copy": net.config.get("copy", "full"), "convolutions": "zero"}
    for name, value in form.items():
        if getattr(config, name) not in (value, CHOICES[name][0]):
            raise UsageError(
                f"{name}={getattr(config, name)}, but {config.start_from} is {value}", f"--set {name}={value}"
            )
    return net, replace(config, **form)
