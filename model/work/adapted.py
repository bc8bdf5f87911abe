"""A job's base under its adapters: LoRAs and learned words, found, checked and applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controlnet.model.base import Base
from controlnet.model.work.options import embedding_of, lora_of
from controlnet.model.work.sources import Sources


def adapted(
    base: Base, loras: Sequence[str], words: Sequence[str], sources: Sources, say: Callable[[str], None]
) -> Base:
    """The base with the LoRAs `FILE[:scale]` and the learned words `FILE[:word]`; it stays as it is. `say` is told how
    much of each LoRA applies. Raises as `open_lora`, `with_loras` and `with_embeddings` do."""
    from controlnet.model.adapters.embedding import read_embedding, with_embeddings
    from controlnet.model.adapters.lora import with_loras
    from controlnet.model.adapters.lora_files import open_lora
    from controlnet.model.adapters.parts import Parts

    parts, files = Parts(base), []
    for text in loras:
        source, scale = lora_of(text)
        file = open_lora(sources.adapter("lora", source), parts, base.name)
        say(
            f"{source}: scale {scale:g}; applied: {file.count()}" + (f"; not {file.first_other}" if file.others else "")
        )
        files.append((file, scale))
    embeddings = []
    for text in words:
        source, word = embedding_of(text)
        embedding = read_embedding(sources.adapter("embedding", source), word)
        count = len(next(iter(embedding.vectors.values())))
        say(f"{source}: the word {embedding.word!r}, of {count} vector{'s' * (count > 1)}")
        embeddings.append(embedding)
    return with_embeddings(with_loras(base, files), embeddings)
