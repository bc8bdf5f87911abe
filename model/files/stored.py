"""A model on disk, whatever its layout: answers in diffusers' words. Headers are read first, tensors when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from controlnet.model.files.tensors import Header
from torch import Tensor

STEMS = {
    "controlnet": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}  # fmt: skip
"""Parts, and the name of their weights in a folder."""
BASE_PARTS = ("unet", "vae", "text_encoder")
COMPONENTS = (*BASE_PARTS, "tokenizer", "scheduler")
"""All that a base needs."""
CONFIGS = "controlnet_toolkit.configs"
"""The key of a single file's metadata where `models convert` writes the configs, which the layout does not have."""
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""How files call what a base predicts, and what diffusers calls it."""


class Stored(Protocol):
    """A model on disk; `layout` says in words how it is stored."""

    path: Path

    @property
    def layout(self) -> str: ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of controlnet, unet, vae, text_encoder are there."""

    def config(self, part: str) -> dict[str, Any]:
        """Raises ModelError where the part is not there, or of no known family."""

    def headers(self, part: str) -> dict[str, Header]:
        """By the names of the file."""

    def state(self, part: str) -> dict[str, Tensor]:
        """By diffusers' names, of the text encoder without the prefix `text_model.`"""

    def prediction(self) -> str | None:
        """epsilon or v_prediction, as far as the files say."""

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config. Raises ModelError where nobody can know it."""

    def predicting(self, prediction: str) -> Stored:
        """The same model, which predicts what somebody says: epsilon or v_prediction."""

    def tokenizer(self, spare: Path) -> Path:
        """The folder of its tokenizer: its own, or CLIP's, written into the folder `spare`."""

    def index(self) -> dict[str, Any]:
        """model_index.json, without the scheduler."""


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that transformers dropped in 5.6, and the ids 0..76, which are no weights."""
    bare = {k.removeprefix("text_model."): t for k, t in state.items()}
    return {k: t for k, t in bare.items() if not k.endswith("position_ids")}


def said(part: str, article: str = "a ") -> str:
    words = {"controlnet": "ControlNet", "unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
    return article + words[part]
