"""The prompt as the networks read it. What is computed from it alone is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Prompt:
    """Text features c_t (B, T, D). In families with an added embedding also the pooled text (B, P) and the ids (B, 6)
    of size and crop; None in others. Keeps the keys and values of every cross-attention that has read it."""

    def __init__(self, c_t: Tensor, pooled: Tensor | None = None, ids: Tensor | None = None):
        self.c_t, self.pooled, self.ids = c_t, pooled, ids
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Rows: B."""
        return len(self.c_t)

    def keys_values(
        self, attention: Any, compute: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Two (B, heads, T, C / heads), computed once."""
        if attention in self._kept:
            return self._kept[attention]
        pair = compute(attention, self.c_t)
        if not torch.is_grad_enabled():  # gradient checkpointing repeats the forward pass, and must do the same
            self._kept[attention] = pair
        return pair

    def with_ids(self, ids: Tensor | None) -> Prompt:
        """With the same ids (1, 6) in every row."""
        return self if ids is None else Prompt(self.c_t, self.pooled, ids.expand(len(self), -1))

    def map(self, function: Callable[[Tensor], Tensor]) -> Prompt:
        """With a function applied to each of its tensors; nothing is kept."""
        tensors = (self.c_t, self.pooled, self.ids)
        return Prompt(*(None if tensor is None else function(tensor) for tensor in tensors))  # type: ignore[arg-type]

    def to(self, *args: Any) -> Prompt:
        return self.map(lambda tensor: tensor.to(*args))

    def to_network(self, device: torch.device, dtype: torch.dtype) -> Prompt:
        """On a device, in a network's type. Ids stay in float32, because bfloat16 would round 1333 to 1336."""
        texts = Prompt(self.c_t, self.pooled).to(device, dtype)
        return texts if self.ids is None else Prompt(texts.c_t, texts.pooled, self.ids.to(device))

    def rows(self, count: int) -> Prompt:
        """A prompt of one row with that row repeated `count` times; one of `count` rows unchanged."""
        return self if len(self) == count else self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    @staticmethod
    def cat(prompts: Sequence[Prompt]) -> Prompt:
        """The rows of all, one after another. Texts of different lengths are repeated until they are equally long:
        attention to repeated keys and values is the same."""
        length = math.lcm(*(prompt.c_t.shape[1] for prompt in prompts))
        c_t = torch.cat([prompt.c_t.repeat(1, length // prompt.c_t.shape[1], 1) for prompt in prompts])
        pooled, ids = (
            None if column[0] is None else torch.cat(column)
            for column in zip(*((prompt.pooled, prompt.ids) for prompt in prompts), strict=True)
        )
        return Prompt(c_t, pooled, ids)
