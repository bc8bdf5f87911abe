"""What this toolkit runs on, what of it is here and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from controlnet.model.work import stock
from controlnet.preprocessors.devices import choose_device, choose_dtype
from controlnet.preprocessors.weights import cache_folder

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "opencv-python-headless", "numpy")
EXTRAS = {
    "openvino": "openvino", "heic": "pillow_heif", "parquet": "pyarrow", "datasets": "datasets", "ray": "ray",
    "webdataset": "webdataset", "urls": "upath", "8bit": "bitsandbytes", "deepspeed": "deepspeed",
    "show": "textual_image",
}  # fmt: skip
"""Extra -> the module that tells whether it is installed."""
LITTLE = 4e9
"""Bytes of free memory or disk that little can be done with."""


@dataclass(frozen=True)
class Finding:
    """A line: what, how it is, and where something should be done about it, what."""

    section: str
    what: str
    how: str
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, section by section."""
    return [*_versions(), *_devices(), *_caches(), *_models(), *_extras()]


def _versions() -> list[Finding]:
    found = [Finding("versions", "controlnet", _version("controlnet-toolkit") or "not installed")]
    found.append(
        Finding("versions", "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    )
    return found + [Finding("versions", name, _version(name) or "missing") for name in LIBRARIES]


def _devices() -> list[Finding]:
    memory = psutil.virtual_memory()
    words = [name for name in ("avx2", "avx512_bf16", "amx_bf16") if _capabilities().get(name)]
    found = [
        Finding("machine", "processor", ", ".join([_processor(), f"{os.cpu_count()} cores", *words])),
        Finding(
            "machine", "memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
            "--low-memory, or fewer programs beside it" if memory.available < LITTLE else "",
        ),
    ]  # fmt: skip
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = f"{torch.cuda.get_device_name(number)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        found.append(Finding("machine", f"cuda:{number}", name))
    if not torch.cuda.is_available():
        built = "; torch is built without it" if torch.version.cuda is None else ""
        found.append(Finding("machine", "CUDA", f"no GPU{built}"))
    device = choose_device(None)
    dtype = str(choose_dtype(None, device)).removeprefix("torch.")
    return [*found, Finding("machine", "used by default", f"{device} in {dtype}")]


def _capabilities() -> dict:
    return getattr(torch.cpu, "get_capabilities", dict)()


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _caches() -> list[Finding]:
    folder = cache_folder()
    if folder.exists() and not folder.is_dir():
        return [Finding("cache", str(folder), "is a file", "set CONTROLNET_CACHE to a folder")]
    where = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(where).free
    more = "" if free > LITTLE else "free some, or set CONTROLNET_CACHE to a folder on another disk"
    found = [Finding("cache", str(folder), f"{free / 1e9:.0f} GB of disk free", more)]
    parts = sorted(one for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []
    return found + [Finding("cache", part.name, _size(part)) for part in parts]


def _size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _models() -> list[Finding]:
    try:
        rows = stock.rows()
    except OSError as error:
        return [Finding("models", "all", f"not known: {error.filename}: {error.strerror}")]
    found = []
    for what in ("base", "ControlNet"):
        here = [row.name for row in rows if row.what == what and row.here]
        found.append(Finding("models", f"{what}s", ", ".join(here) or "none"))
    detectors = [row for row in rows if row.what == "detector"]
    found.append(
        Finding("models", "detectors' weights", ", ".join(row.name for row in detectors if row.here) or "none")
    )
    missing = [row.name for row in detectors if not row.here and row.name in stock.default_weights()]
    if missing:
        fix = f"controlnet models pull {' '.join(missing)}"
        found.append(Finding("models", "of default detectors", f"not here: {', '.join(missing)}", fix))
    return found


def _extras() -> list[Finding]:
    here = [extra for extra, module in EXTRAS.items() if find_spec(module)]
    missing = [extra for extra in EXTRAS if extra not in here]
    found = [Finding("extras", "installed", ", ".join(here) or "none")]
    if missing:
        fix = f"pip install 'controlnet-toolkit[{','.join(missing)}]'"
        found.append(Finding("extras", "not installed", ", ".join(missing), fix))
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
