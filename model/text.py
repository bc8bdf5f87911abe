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

    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, D), and the pooled text (B, P) where the network projects it. Words beyond its length are
        cut."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        out = self.network(tokens.input_ids.to(device), output_hidden_states=bool(self.skipped))
        features = out.hidden_states[-1 - self.skipped] if self.skipped else out.last_hidden_state
        return features, out.get("text_embeds")

    def cut_words(self, text: str) -> str:
        """The end of the text that lies beyond its length, or ''."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[self.max_tokens - 2 :]).strip()
