"""Tokenizers: a folder's own, and CLIP's, which ships with this package for models in a single file."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from controlnet.preprocessors.errors import ModelError, reason
from controlnet.preprocessors.files import write_file

MERGES = Path(__file__).parent / "shipped" / "clip" / "merges.txt"
"""The merges of CLIP's byte-pair encoding (github.com/openai/CLIP, MIT), which all families use."""


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Load a folder's tokenizer. Raises ModelError if it cannot be loaded or has no maximum length."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises a dozen types for a broken file
        raise ModelError(f"{folder}: cannot be loaded: {reason(error)}", f"ls {folder}") from error
    if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 3:
        raise ModelError(f"{folder}: model_max_length is {tokenizer.model_max_length!r}, expected a number of tokens")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{folder}: has no pad_token", f"ls {folder}")
    return tokenizer


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write CLIP's tokenizer as a folder. `pad_token` differs from family to family."""
    merges = MERGES.read_text()
    end = "<|endoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "model_max_length": 77,
        "errors": "replace",
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": pad_token,
    }
    write_file(folder / "merges.txt", merges.encode())
    write_file(folder / "vocab.json", json.dumps(clip_vocabulary(merges), ensure_ascii=False).encode())
    write_file(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def clip_vocabulary(merges: str) -> dict[str, int]:
    """Token -> id, 49,408 tokens in CLIP's order: 256 bytes, 256 bytes that end a word, one per merge, two specials."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pairs = [line.replace(" ", "") for line in merges.splitlines() if line and not line.startswith("#version")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *pairs, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}
