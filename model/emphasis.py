"""Prompts as people write them, as A1111's web UI reads them (github.com/AUTOMATIC1111/stable-diffusion-webui,
modules/prompt_parser.py and sd_hijack_clip.py): (words:1.2) weigh more, (words) 1.1 times as much, [words] less by as
much, a backslash before a bracket makes it a plain one, and BREAK begins a new chunk of the text encoder's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

STEP = 1.1
"""What a pair of round brackets multiplies by, and a pair of square ones divides by."""
BACKTRACK = 20
"""A chunk ends at its last comma if that is so many tokens from its end, or fewer."""
_WORD = re.compile(r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|]|[^\\()\[\]:]+|:", re.VERBOSE)
_BREAK = re.compile(r"\s*\bBREAK\b\s*", re.DOTALL)


@dataclass
class Piece:
    """A part of a prompt with one weight. `text` None begins a new chunk."""

    text: str | None
    weight: float = 1.0


def pieces(prompt: str) -> list[Piece]:
    """The parts of a prompt, neighbours of equal weight joined; at least one."""
    found: list[Piece] = []
    round_, square = [], []

    def multiply(start: int, by: float) -> None:
        for piece in found[start:]:
            piece.weight *= by

    for match in _WORD.finditer(prompt):
        text, weight = match[0], match[1]
        if text.startswith("\\"):
            found.append(Piece(text[1:]))
        elif text == "(":
            round_.append(len(found))
        elif text == "[":
            square.append(len(found))
        elif weight is not None and round_:
            multiply(round_.pop(), _number(weight))
        elif text == ")" and round_:
            multiply(round_.pop(), STEP)
        elif text == "]" and square:
            multiply(square.pop(), 1 / STEP)
        else:
            for k, part in enumerate(_BREAK.split(text)):
                found += [Piece(None)] * (k > 0) + [Piece(part)]
    for start in round_:
        multiply(start, STEP)
    for start in square:
        multiply(start, 1 / STEP)
    return _joined(found) or [Piece("")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # such as 1.2.3
        return 1.0


def _joined(found: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in found:
        last = joined[-1] if joined else None
        if last and last.text is not None and piece.text is not None and last.weight == piece.weight:
            last.text += piece.text
        elif piece.text is None:
            joined.append(Piece(None))
        elif piece.text:
            joined.append(piece)
    return joined


def plain(prompt: str) -> str:
    """The words of a prompt alone."""
    return " ".join(piece.text for piece in pieces(prompt) if piece.text is not None)


@dataclass
class Chunk:
    """Tokens for one call of a text encoder, without the first and the last one, and their weights."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def cut(self, at: int) -> Chunk:
        """Cut what comes from `at` on, and return it."""
        rest = Chunk(self.ids[at:], self.weights[at:])
        del self.ids[at:], self.weights[at:]
        return rest


def chunks(prompt: str, tokenize: Callable[[str], list[list[int]]], length: int, comma: int) -> list[Chunk]:
    """A prompt in chunks of at most `length` tokens. `tokenize` returns tokens in groups that stay together, most of
    one; `comma` is the token at which a full chunk rather ends."""
    done, chunk, last_comma = [], Chunk(), -1
    for piece in pieces(prompt):
        if piece.text is None:
            done.append(chunk)
            chunk, last_comma = Chunk(), -1
            continue
        for group in tokenize(piece.text):
            is_full = len(chunk.ids) == length
            if group == [comma]:
                last_comma = len(chunk.ids)
            elif is_full and last_comma != -1 and length - last_comma <= BACKTRACK:
                rest = chunk.cut(last_comma + 1)
                done.append(chunk)
                chunk, last_comma = rest, -1
            if chunk.ids and len(chunk.ids) + len(group) > length:
                done.append(chunk)
                chunk, last_comma = Chunk(), -1
            chunk.ids += group[:length]
            chunk.weights += [piece.weight] * len(group[:length])
    return [*done, chunk] if chunk.ids or not done else done
