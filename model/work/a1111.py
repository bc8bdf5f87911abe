"""The record of an image as AUTOMATIC1111's web UI writes it: the `parameters` text that many programs read.

The form is that of its modules/infotext_utils.py and processing.py, and of sd-webui-controlnet's infotext: a line of
the prompt, one of the negative prompt, one of settings, `Name: value` between commas, values with commas or colons in
quotes.
"""

from __future__ import annotations

import json
import re
from typing import Any

SAMPLERS = {
    "ddim": ("DDIM", None), "pndm": ("PLMS", None), "euler": ("Euler", None), "euler_a": ("Euler a", None),
    "heun": ("Heun", None), "dpm++2m": ("DPM++ 2M", "Automatic"), "dpm++2m_karras": ("DPM++ 2M", "Karras"),
    "sde-dpm++": ("DPM++ 2M SDE", "Automatic"), "unipc": ("UniPC", None), "lcm": ("LCM", None),
}  # fmt: skip
"""Our scheduler -> (sampler, schedule type)."""
MODULES = {
    "canny": "canny", "pose": "openpose", "depth": "depth_midas", "normal": "normal_midas", "softedge": "softedge_hed",
    "scribble": "scribble_hed", "lineart": "lineart_realistic",
}  # fmt: skip
"""Kind that was detected -> preprocessor; without one the map came as it is."""
NEGATIVE = "Negative prompt:"


def parameters(record: dict[str, Any]) -> str:
    """The text. What a prompt says stays in its line: it sets nothing."""
    name = record.get("sampler") or record["scheduler"]
    sampler, schedule = SAMPLERS.get(name, (name, None))
    settings = {
        "Steps": record["steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{record['guidance']:g}",
        "Seed": record["seed"],
        "Size": "x".join(map(str, record["size"])),
        "Model hash": str(record.get("base_sha256") or "")[:10] or None,
        "Model": record["base"],
        "VAE hash": str(record.get("vae_sha256") or "")[:10] or None,
        "Denoising strength": record.get("strength") if record.get("init") else record.get("hires_strength"),
        "Clip skip": record["clip_skip"] + 1 if record.get("clip_skip") else None,
        **{f"ControlNet {i}": _unit(entry, record) for i, entry in enumerate(record.get("conditions") or [])},
        "Version": f"controlnet {record.get('versions', {}).get('controlnet', '')}".strip(),
    }
    lines = [_line(record["prompt"])]
    if record.get("negative"):
        lines.append(f"{NEGATIVE} {_line(record['negative'])}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(line for line in lines if line)


def _unit(entry: dict[str, Any], record: dict[str, Any]) -> str:
    """A condition as the web UI's extension writes a unit."""
    detect = entry.get("detect") or {}
    options = detect.get("options") or {}
    parts = {
        "Module": MODULES.get(str(entry["kind"]), str(entry["kind"])) if detect else "none",
        "Model": f"{entry['net']} [{str(entry.get('net_sha256') or '')[:8]}]",
        "Weight": _first(entry["scale"]),
        "Resize Mode": "Crop and Resize",
        "Processor Res": min(detect["size"]) if detect.get("size") else None,
        "Threshold A": options.get("low"),
        "Threshold B": options.get("high"),
        "Guidance Start": f"{entry['start']:g}",
        "Guidance End": f"{entry['end']:g}",
        "Control Mode": _way(entry, record),
    }
    return ", ".join(f"{name}: {_plain(value)}" for name, value in parts.items() if value is not None)


def _way(entry: dict[str, Any], record: dict[str, Any]) -> str:
    """The nearest of the extension's three modes."""
    if record.get("control_on") == "cond":
        return "ControlNet is more important"
    return "My prompt is more important" if entry.get("weighting") == "soft" else "Balanced"


def _first(scale: Any) -> str:
    """The number of a scale; of a schedule `1@0/.3@.6` the first one."""
    found = re.match(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", str(scale))
    return f"{float(found[0]):g}" if found else str(scale)


def _line(text: str) -> str:
    """A prompt in one line, which is not taken for another one."""
    line = " ".join(text.split())
    return f"({line})" if line.startswith(NEGATIVE) else line


def _plain(value: Any) -> str:
    """Inside of a unit nothing is quoted: what would end a value is left out."""
    return re.sub(r"[,:\"\n]", " ", str(value)).strip()


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text
