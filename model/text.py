"""Text encoders: words to the features that a base's networks read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
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
    """Layers at its end that are not read: then the last one that is gives its features, without the final norm."""

    @property
    def max_tokens(self) -> int:
        return min(self.tokenizer.model_max_length, self.network.config.max_position_embeddings)

    def __call__(self, texts: list[str], device: torch.device, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, D), and the pooled text (B, P) where the network projects it. Words beyond its length are
        cut. `skip` leaves out more layers at the end; a family that reads the final norm has it still."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        skip += self.skipped
        out = self.network(tokens.input_ids.to(device), output_hidden_states=bool(skip))
        features = out.hidden_states[-1 - skip] if skip else out.last_hidden_state
        if skip and not self.skipped:
            features = getattr(self.network, "text_model", self.network).final_layer_norm(features)
        return features, out.get("text_embeds")

    @property
    def layers(self) -> int:
        """How many it has that are read."""
        return self.network.config.num_hidden_layers - self.skipped

    def cut_words(self, text: str) -> str:
        """The end of the text that lies beyond its length, or ''."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[self.max_tokens - 2 :]).strip()
