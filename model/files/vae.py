"""A VAE by itself, used in the place of a base's own: a folder in diffusers' layout, or a single file in the names of
either layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.model.files import names
from controlnet.model.files.configs import completed
from controlnet.model.files.families import SUPPORTED
from controlnet.model.files.folder import renewed
from controlnet.model.files.single import SingleFile
from controlnet.model.files.stored import STEMS
from controlnet.model.files.tensors import read_header, read_json, read_tensors, read_weights
from controlnet.preprocessors.errors import ModelError
from torch import Tensor

MARK = "decoder.conv_in.weight"
"""A tensor (C, latent channels, 3, 3) that every VAE has."""
PREFIXES = ("first_stage_model.", "")
"""Before the names of a VAE in a single file: in a whole base, or alone."""


@dataclass(frozen=True)
class LoneVae:
    """A VAE on disk; `of_base` is the config of the VAE whose place it takes."""

    path: Path
    of_base: Mapping[str, Any]

    def config(self, part: str = "vae") -> dict[str, Any]:
        """Its config; a single file has none, and gets that of the base's own VAE. Raises ModelError for a VAE that was
        made for other bases."""
        if self.path.is_dir():
            config = read_json(self.path / "config.json", "the config of a VAE in diffusers' layout")
            name = str(config.get("_class_name"))
            if not name.startswith("Autoencoder"):
                raise ModelError(f"{self.path}: a {name}, expected a VAE", "controlnet models show " + str(self.path))
            config = completed({key: value for key, value in config.items() if value is not None}, name, self.path)
        else:
            config = self._file_config()
        if config.get("_class_name") == "AutoencoderTiny":
            return config  # it reads latents as the UNet has them, of whichever family it was made for
        for key in ("latent_channels", "scaling_factor", "shift_factor"):
            own, other = config.get(key) or 0, self.of_base.get(key) or 0
            if own != other:
                families = " or ".join(f.name for f in SUPPORTED if f.vae.get(key) == own)
                raise ModelError(
                    f"{self.path}: a VAE{f' of {families}' if families else ''}, {key} {own}; the base's has {other}",
                    "a VAE that was made for this base",
                )
        return config

    def _file_config(self) -> dict[str, Any]:
        """In a whole base its family says the config; a VAE alone does not say which family it is of."""
        headers = read_header(self.path)[0]
        channels = headers[self._prefix() + MARK].shape[1]
        if any(name.startswith("model.diffusion_model.") for name in headers):
            return SingleFile(self.path).config("vae") | {"latent_channels": channels}
        return dict(self.of_base) | {"latent_channels": channels}

    def state(self, part: str = "vae") -> dict[str, Tensor]:
        """Its tensors under diffusers' names."""
        if self.path.is_dir():
            return renewed(read_weights(self.path, STEMS["vae"]))
        prefix = self._prefix()
        own = [name for name in read_header(self.path)[0] if name.startswith(prefix)]
        state = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(self.path, own).items()}
        if any(name.startswith("decoder.up_blocks.") for name in state):
            return renewed(state)
        return names.linear_attention(names.rename(state, names.vae(self.of_base)))

    def _prefix(self) -> str:
        headers = read_header(self.path)[0]
        for prefix in PREFIXES:
            if prefix + MARK in headers:
                return prefix
        raise ModelError(f"{self.path}: holds no VAE", f"controlnet models show {self.path}")
