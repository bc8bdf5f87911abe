"""A model on disk, in any layout, described in diffusers' words. Headers are read first, tensors only when needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from controlnet.model.files.tensors import Header
from torch import Tensor

STEMS = {
    "controlnet": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
    "text_encoder": "model", "text_encoder_2": "model",
}  # fmt: skip
"""Part -> file name of its weights in a folder, without ending."""
BASE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The networks that a base may have."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
EMBEDDING_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""What the file of a LoRA, or of textual inversion, is called in a folder; else it is the only .safetensors there."""
NET_CLASS, UNION_CLASS = "ControlNetModel", "ControlNetUnionModel"
T2I_CLASS = "T2IAdapter"
"""The classes of diffusers that control."""
UNION_MARK = "task_embedding"
"""A tensor that unions alone have, (types, width)."""
CONFIGS = "controlnet_toolkit.configs"
"""The key in a single file's metadata under which `models convert` writes the configs; the layout has no place for
them."""
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""What a base predicts: words found in files -> diffusers' words."""


class Stored(Protocol):
    """A model on disk; `layout` says in words how it is stored."""

    path: Path

    @property
    def layout(self) -> str: ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts it has: controlnet, unet, vae, text_encoder, text_encoder_2."""

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part. Raises ModelError for a part that it does not have, and for an unknown family."""

    def headers(self, part: str) -> dict[str, Header]:
        """The headers of a part's tensors, under the names in the file."""

    def state(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part, under diffusers' names; a text encoder's without the prefix `text_model.`"""

    def prediction(self) -> str | None:
        """epsilon or v_prediction; None if the files do not say."""

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config. Raises ModelError if the files do not say what the model predicts."""

    def predicting(self, prediction: str) -> Stored:
        """The same model, said to predict epsilon or v_prediction."""

    def tokenizer(self, name: str, spare: Path) -> Path:
        """The folder of a tokenizer (`tokenizer`, `tokenizer_2`): the model's own, else CLIP's, written into
        `spare`."""

    @property
    def none_is_zeros(self) -> bool:
        """Whether the features of no prompt at all are zeros, and not those of the empty text."""

    def index(self) -> dict[str, Any]:
        """The content of model_index.json, without the scheduler."""


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors without the prefix that transformers dropped in 5.6, and without the position ids, which
    are not weights."""
    bare = {k.removeprefix("text_model."): t for k, t in state.items()}
    return {k: t for k, t in bare.items() if not k.endswith("position_ids")}


def public_text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `text_state`: with the prefix of the public files, which every version of transformers reads."""
    return {k if k.startswith("text_projection") else f"text_model.{k}": t for k, t in state.items()}


def in_words(part: str, article: str = "a ") -> str:
    words = {
        "controlnet": "ControlNet",
        "unet": "UNet",
        "vae": "VAE",
        "text_encoder": "text encoder",
        "text_encoder_2": "second text encoder",
    }
    return article + words[part]
