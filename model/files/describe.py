"""What a model on disk is, in words and figures, from its headers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from controlnet.model.files.families import SD1, SDXL, family_name
from controlnet.model.files.layouts import open_model
from controlnet.model.files.stored import T2I_CLASS, UNION_CLASS
from controlnet.preprocessors.kinds import union_kinds


def described(path: Path) -> dict[str, Any]:
    """What `models show` prints of the model at a path; reads no tensor. Raises ModelError."""
    stored = open_model(path)
    net = "controlnet" in stored.parts
    configs = {part: stored.config(part) for part in stored.parts}
    headers = {part: stored.headers(part) for part in stored.parts}
    first = configs["controlnet" if net else stored.parts[0]]
    said = {"unet": "base", "controlnet": "ControlNet"}
    what = [word for part, word in said.items() if part in configs] or [p.replace("_", " ") for p in configs]
    fields: dict[str, Any] = {
        "path": str(stored.path),
        "what": " and ".join(what),
        "format": stored.layout,
        "family": family_name(configs.get("unet", first)),
        "dtype": sorted({h.dtype for part in headers.values() for h in part.values() if "float" in h.dtype}),
        "parameters": {part: sum(math.prod(h.shape) for h in head.values()) for part, head in headers.items()},
    }
    if net and first["_class_name"] == T2I_CLASS:
        fields |= {"what": "T2I-Adapter", "family": SDXL.name if first["adapter_type"].endswith("xl") else SD1.name}
    elif net:
        config = configs["controlnet"]
        if config["_class_name"] == UNION_CLASS:
            fields["kinds"] = list(union_kinds(config["num_control_type"]))
        hint = config.get("hint_encoder", "released")
        fields["hint_encoder"] = {"form": hint, "widths": list(config["conditioning_embedding_out_channels"])}
    if "unet" in configs:
        fields["prediction"] = stored.prediction() or "unknown"
    return fields
