"""A model on disk, whatever its layout: answers in diffusers' words. Headers are read first, tensors when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from controlnet.model.files.tensors import Header
from torch import Tensor

STEMS = {
    "controlnet": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
    "text_encoder": "model", "text_encoder_2": "model",
}  # fmt: skip
"""Parts, and the name of their weights in a folder."""
BASE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The networks that a base may have."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
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
        """Which of controlnet, unet, vae, text_encoder, text_encoder_2 are there."""

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

    def tokenizer(self, name: str, spare: Path) -> Path:
        """The folder of a tokenizer (`tokenizer`, `tokenizer_2`): its own, or CLIP's, written into `spare`."""

    def index(self) -> dict[str, Any]:
        """model_index.json, without the scheduler."""


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that transformers dropped in 5.6, and the ids 0..76, which are no weights."""
    bare = {k.removeprefix("text_model."): t for k, t in state.items()}
    return {k: t for k, t in bare.items() if not k.endswith("position_ids")}


def public_text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: with the prefix of the public files, which every version of transformers reads."""
    return {k if k.startswith("text_projection") else f"text_model.{k}": t for k, t in state.items()}


def said(part: str, article: str = "a ") -> str:
    words = {
        "controlnet": "ControlNet",
        "unet": "UNet",
        "vae": "VAE",
        "text_encoder": "text encoder",
        "text_encoder_2": "second text encoder",
    }
    return article + words[part]
