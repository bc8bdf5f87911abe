"""Networks in TensorFlow Lite's format, run by LiteRT."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
from controlnet.preprocessors.errors import ModelError, reason

Shapes = tuple[tuple[int, ...], ...]
"""Of a network's input and of its first outputs."""
_LOADING = Lock()
_ONE_AT_A_TIME = Lock()
"""LiteRT's interpreter belongs to one thread at a time."""


def load(path: Path, shapes: Shapes, name: str):
    """The network in a file, loaded once. Raises ModelError for another file, or one whose input and outputs have other
    shapes; `name` is that of the weights."""
    with _LOADING:  # standard error is silent meanwhile, for all threads
        return _load(path, shapes, name)


@cache
def _load(path: Path, shapes: Shapes, name: str):
    from ai_edge_litert.interpreter import Interpreter

    cure = f"controlnet models pull {name}, or --weights DIR"
    try:
        with _silence():
            network = Interpreter(str(path), num_threads=1)
            network.allocate_tensors()
        own = [network.get_input_details()[0], *network.get_output_details()[: len(shapes) - 1]]
    except Exception as error:  # LiteRT's own errors, for a file of something else
        raise ModelError(f"{path}: is not the network of {name} ({reason(error)})", cure) from error
    found = tuple(tuple(int(side) for side in one["shape"]) for one in own)
    if found != shapes:
        raise ModelError(f"{path}: a network of other shapes, {found}; {name} has {shapes}", cure)
    return network


def run(network, pixels: np.ndarray, outputs: int) -> list[np.ndarray]:
    """The first outputs for (H, W, C) pixels, without the batch dimension."""
    with _ONE_AT_A_TIME:
        network.set_tensor(network.get_input_details()[0]["index"], pixels[None].astype(np.float32))
        network.invoke()
        return [network.get_tensor(one["index"]).copy()[0] for one in network.get_output_details()[:outputs]]


@contextmanager
def _silence() -> Iterator[None]:
    """Silence standard error, where LiteRT's C++ code prints a greeting."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
