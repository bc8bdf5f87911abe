"""Converts a model from one layout to the other. Every tensor keeps its numbers and its type.

What a single file holds beside the networks is left out: averaged weights of training, tables of the noise schedule,
and OpenCLIP's last layer, which SD 2 never reads.
"""

from __future__ import annotations

from pathlib import Path

from controlnet.model.files.layouts import LAYOUTS, open_model


def convert(source: Path, out: Path, to: str, prediction: str | None = None) -> None:
    """Write the model at `source` to `out`: a folder if `to` is `diffusers`, a .safetensors file if it is `original`. A
    file that holds a base and a ControlNet becomes the base's folder, with the ControlNet in its folder `controlnet`.

    Raises ModelError for what cannot be converted, UsageError for a wrong `out`, OutputError when it cannot be written;
    then nothing is left of it.
    """
    stored = open_model(source)
    if prediction is not None:
        stored = stored.predicting(prediction)
    LAYOUTS[to].write(stored, out)
