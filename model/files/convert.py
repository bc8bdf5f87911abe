"""One layout made of the other: read here, written there. Every tensor keeps its numbers and its type.

What a single file holds beside the networks (averaged weights of training, tables of the noise schedule, OpenCLIP's
last layer, which SD 2 never reads) is not carried over.
"""

from __future__ import annotations

from pathlib import Path

from controlnet.model.files.layouts import LAYOUTS, open_model


def convert(source: Path, out: Path, to: str, prediction: str | None = None) -> None:
    """Write the model at `source` to `out`: a folder for `diffusers`, a .safetensors file for `original`. A file with a
    base and a ControlNet becomes the base's folder with the ControlNet's in it, `controlnet`.

    Raises ModelError for what cannot be converted, UsageError for a wrong `out`, OutputError when it cannot be written;
    then nothing is left of it.
    """
    stored = open_model(source)
    if prediction is not None:
        stored = stored.predicting(prediction)
    LAYOUTS[to].write(stored, out)
