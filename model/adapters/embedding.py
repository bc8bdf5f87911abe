"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): words whose vectors were learned, in the forms people share.

A file holds one tensor (n, D) or (D,), or one by name: {word: tensor}, A1111's {string_to_param: {"*": tensor}, name}
and {emb_params: tensor}, SDXL's {clip_l: tensor, clip_g: tensor}. Pickles are read without running what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controlnet.model.adapters.parts import file_in
from controlnet.model.base import Base
from controlnet.model.files.families import family_by_width
from controlnet.model.files.stored import EMBEDDING_FILES
from controlnet.model.files.tensors import check_finite, read_pickle, read_tensors
from controlnet.preprocessors.errors import ModelError, UsageError
from torch import Tensor, nn

PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""The names of SDXL's two tensors, and the encoders that they are for."""
NAMELESS = ("emb_params", "*", "")
"""Names of tensors that are no words."""


@dataclass(frozen=True)
class Embedding:
    """A learned word. `vectors` are (n, D) by the part they are for; a part "" is any encoder of that width."""

    path: Path
    word: str
    vectors: dict[str, Tensor]


def read_embedding(path: Path, word: str | None = None) -> Embedding:
    """Read a file, or the file of a folder; `word` stands in place of the file's own. Raises ModelError for a file that
    holds something else."""
    file = file_in(path, EMBEDDING_FILES)
    found: Any = read_tensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    name = ""
    if isinstance(found, dict) and isinstance(found.get("string_to_param"), (dict, nn.ParameterDict)):
        name, found = str(found.get("name") or ""), dict(found["string_to_param"].items())
    found = {"": found} if isinstance(found, Tensor) else found if isinstance(found, dict) else {}
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if tensors.keys() == PAIR.keys():
        vectors = {PAIR[key]: _rows(file, tensor) for key, tensor in tensors.items()}
    elif len(tensors) == 1:
        ((own, tensor),) = tensors.items()
        name = name or (own if own not in NAMELESS else "")
        vectors = {"": _rows(file, tensor)}
    else:
        raise ModelError(
            f"{file}: holds {len(tensors)} tensors ({', '.join(list(tensors)[:3])}), expected the vectors of one word",
            "a file of textual inversion; a LoRA is given with --lora",
        )
    check_finite({part or "its vectors": tensor for part, tensor in vectors.items()}, file)
    word = (word or name or file.stem).strip()
    if not re.search(r"[^\s,()\[\]\\:]", word) or re.search(r"\s|[()\[\]\\]", word) or word == "BREAK":
        raise UsageError(f"--embedding {path}: {word!r} can be no word of a prompt", f"--embedding {path}:WORD")
    return Embedding(file, word, vectors)


def _rows(file: Path, tensor: Tensor) -> Tensor:
    if tensor.ndim not in (1, 2) or tensor.is_sparse or tensor.is_complex() or not tensor.numel():
        raise ModelError(f"{file}: vectors of shape {tuple(tensor.shape)}, expected (number, width)")
    return tensor.detach().float().reshape(-1, tensor.shape[-1])


def with_embeddings(base: Base, embeddings: Sequence[Embedding]) -> Base:
    """The base with learned words; networks and tokenizers are those of `base`. Raises ModelError for vectors of
    another width than the base's encoders read, UsageError for a word that is there already."""
    encoders = list(base.encoders)
    for one in embeddings:
        word = one.word.lower()
        if any(word in encoder.learned for encoder in encoders):
            raise UsageError(
                f"--embedding {one.path}: {one.word!r} is the word of another embedding too",
                f"--embedding {one.path}:OTHERWORD",
            )
        fitting = [vectors for encoder in encoders if (vectors := _fitting(one, encoder)) is not None]
        if len(fitting) < len(encoders):
            raise _other_family(one, base)
        if (count := max(map(len, fitting))) > base.max_tokens - 2:
            raise ModelError(
                f"{one.path}: {count} vectors, base {base.name} reads {base.max_tokens - 2} tokens at once"
            )
        encoders = [
            replace(encoder, learned=encoder.learned | {word: vectors})
            for encoder, vectors in zip(encoders, fitting, strict=True)
        ]
    return replace(base, encoders=encoders)


def _fitting(one: Embedding, encoder: Any) -> Tensor | None:
    width = encoder.network.get_input_embeddings().weight.shape[1]
    vectors = one.vectors.get(encoder.part, one.vectors.get(""))
    return vectors if vectors is not None and vectors.shape[1] == width else None


def _other_family(one: Embedding, base: Base) -> ModelError:
    own = sorted(vectors.shape[1] for vectors in one.vectors.values())
    widths = [encoder.network.get_input_embeddings().weight.shape[1] for encoder in base.encoders]
    family = family_by_width(own[0] if len(own) == 1 else sum(own), len(own) > 1)
    return ModelError(
        f"{one.path}: does not fit base {base.name}: its vectors are {' and '.join(map(str, own))} wide"
        + (f" ({family.name})" if family else "")
        + f", the base's encoders read {' and '.join(map(str, widths))}",
        "an embedding for this base, or another --base",
    )
