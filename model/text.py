"""Text encoders: they turn prompts into the features that a base's networks read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from controlnet.preprocessors.errors import ModelError
from torch import Tensor


@dataclass
class TextEncoder:
    """One of a base's text encoders, with its tokenizer."""

    part: str
    """Its name in diffusers' layout: text_encoder, text_encoder_2."""
    network: Any
    """CLIPTextModel, or CLIPTextModelWithProjection, which has pooled text too; None while it is unloaded."""
    tokenizer: transformers.PreTrainedTokenizerBase
    skipped: int = 0
    """How many layers at its end the family leaves out. If any, the features are the last remaining layer's output,
    without the final norm."""

    @property
    def max_tokens(self) -> int:
        return min(self.tokenizer.model_max_length, self.network.config.max_position_embeddings)

    def __call__(self, texts: list[str], device: torch.device, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, D), and the pooled text (B, P) if the network has a projection, else None. Words beyond
        `max_tokens` are cut. `skip` more layers are left out at the end; the final norm still follows in families that
        have it."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        if int(tokens.input_ids.max()) >= self.network.config.vocab_size:
            raise ModelError(
                f"the tokenizer of its {self.part} knows {len(self.tokenizer)} tokens, the network"
                f" {self.network.config.vocab_size}",
                "a base with a tokenizer of its own, as a folder in diffusers' layout",
            )
        skip += self.skipped
        out = self.network(tokens.input_ids.to(device), output_hidden_states=bool(skip))
        features = out.hidden_states[-1 - skip] if skip else out.last_hidden_state
        if skip and not self.skipped:
            features = getattr(self.network, "text_model", self.network).final_layer_norm(features)
        return features, out.get("text_embeds")

    @property
    def layers(self) -> int:
        """How many layers the family uses."""
        return self.network.config.num_hidden_layers - self.skipped

    def cut_words(self, text: str) -> str:
        """The end of the text that lies beyond `max_tokens`, or ''."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[self.max_tokens - 2 :]).strip()
