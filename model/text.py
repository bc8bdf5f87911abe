"""Text encoders: they turn prompts into the features that a base's networks read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from controlnet.model.emphasis import Chunk, chunks
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
    learned: dict[str, Tensor] = field(default_factory=dict)
    """The words of textual inversion, in small letters, and the vectors (n, D) that the network reads for each."""

    @property
    def max_tokens(self) -> int:
        return min(self.tokenizer.model_max_length, self.network.config.max_position_embeddings)

    def __call__(self, texts: list[str], device: torch.device, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, D), and the pooled text (B, P) if the network has a projection, else None. Words beyond
        `max_tokens` are cut. `skip` more layers are left out at the end; the final norm still follows in families that
        have it."""
        length = self.max_tokens - 2
        whole = [[token for group in self._tokens(text) for token in group] for text in texts]
        return self._encode(torch.tensor([self._framed(ids[:length]) for ids in whole]), device, skip)

    def emphasised(
        self, text: str, device: torch.device, skip: int = 0, least: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Features (1, n T, D) of a prompt with weights, in n chunks, `least` or more, and the pooled text of the first
        one. Each chunk's features are multiplied by the weights of their tokens, and brought back to the mean that they
        had, as A1111's web UI does."""
        features, pooled = [], None
        found = self.chunks(text)
        for chunk in [*found, *[Chunk()] * (least - len(found))]:
            z, pooled_here = self._encode(torch.tensor([self._framed(chunk.ids)]), device, skip)
            if any(weight != 1 for weight in chunk.weights):
                framed = [1.0, *chunk.weights, *[1.0] * (self.max_tokens - 1 - len(chunk.weights))]
                weighted = z * torch.tensor(framed, device=z.device, dtype=z.dtype)[None, :, None]
                # A mean next to nothing, as of a network without biases, says nothing.
                z = weighted * (z.mean() / weighted.mean()) if z.mean().abs() > 1e-4 * z.std() else weighted
            features.append(z)
            pooled = pooled_here if pooled is None else pooled
        return torch.cat(features, 1), pooled

    def chunks(self, text: str) -> list[Chunk]:
        """A prompt with weights in chunks of what the encoder reads at once."""
        return chunks(text, self._tokens, self.max_tokens - 2, self.comma)

    @property
    def comma(self) -> int:
        """The token of a comma."""
        return self.tokenizer(",", add_special_tokens=False).input_ids[-1]

    def _tokens(self, text: str) -> list[list[int]]:
        """The tokens of a text, those of a learned word together: -1 - k for vector k of all."""
        places, count = {}, 0
        for word, vectors in self.learned.items():
            places[word] = [-1 - k for k in range(count, count + len(vectors))]
            count += len(vectors)
        groups: list[list[int]] = []
        for part in words_apart(text, places):
            own = self.tokenizer(part, add_special_tokens=False, verbose=False).input_ids
            groups += [places[part.lower()]] if part.lower() in places else [[token] for token in own]
        return groups

    def _framed(self, ids: list[int]) -> list[int]:
        """Tokens with the first and the last one, padded."""
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        padding = [self.tokenizer.pad_token_id] * (self.max_tokens - 2 - len(ids))
        return [first, *ids, last, *padding]

    def _encode(self, ids: Tensor, device: torch.device, skip: int) -> tuple[Tensor, Tensor | None]:
        table = self.network.get_input_embeddings()
        if int(ids.max()) >= len(table.weight):
            raise ModelError(
                f"the tokenizer of its {self.part} knows {len(self.tokenizer)} tokens, the network {len(table.weight)}",
                "a base with a tokenizer of its own, as a folder in diffusers' layout",
            )
        skip += self.skipped
        # A learned word stands as a comma, so that the last token, whose text is pooled, is found.
        plain = ids.masked_fill(ids < 0, self.comma) if self.learned else ids
        hook = table.register_forward_hook(partial(self._put_learned, ids))
        try:
            out = self.network(plain.to(device), output_hidden_states=bool(skip))
        finally:
            hook.remove()
        features = out.hidden_states[-1 - skip] if skip else out.last_hidden_state
        if skip and not self.skipped:
            features = getattr(self.network, "text_model", self.network).final_layer_norm(features)
        return features, out.get("text_embeds")

    def _put_learned(self, ids: Tensor, module: Any, args: Any, read: Tensor) -> Tensor:
        """What the network reads of tokens (B, T): of those below 0, the learned vectors."""
        if not bool((ids < 0).any()):
            return read
        vectors = torch.cat(list(self.learned.values())).to(read.device, read.dtype)
        own = (ids < 0).to(read.device)
        read[own] = vectors[(-1 - ids[ids < 0]).to(read.device)]
        return read

    @property
    def layers(self) -> int:
        """How many layers the family uses."""
        return self.network.config.num_hidden_layers - self.skipped

    def cut_words(self, text: str) -> str:
        """The end of the text that lies beyond `max_tokens`, or ''."""
        ids = [token for group in self._tokens(text) for token in group]
        return self.tokenizer.decode([token for token in ids[self.max_tokens - 2 :] if token >= 0]).strip()


def words_apart(text: str, words: Iterable[str]) -> list[str]:
    """A text cut around some words, where they stand as words, in small letters or capitals; a word within a longer one
    is none."""
    names = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    if not names:
        return [text]
    bounded = rf"(?i)((?<![\w-])(?=[\w-])|(?=[^\w-]))({names})((?<=[\w-])(?![\w-])|(?<=[^\w-]))"
    found, end = [], 0
    for match in re.finditer(bounded, text):
        found += [text[end : match.start()], match[2]]
        end = match.end()
    return [part for part in (*found, text[end:]) if part]
