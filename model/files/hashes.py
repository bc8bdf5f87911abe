"""The identity of a model: one sha256 of its file, or of all weights in its folder. Cached by the files' size and time
of change."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from controlnet.preprocessors.errors import OutputError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.weights import cache_folder


def model_hash(model: Path) -> str:
    """The sha256 of a single file's content, or of names and contents of all weights below a folder (ControlNets in a
    base's folder do not count)."""
    model = Path(model)
    folder = model if model.is_dir() else model.parent
    files = (
        [model]
        if model.is_file()
        else sorted(
            path
            for path in folder.rglob("*")
            if path.suffix in (".safetensors", ".bin", ".pth") and not _of_a_net(path.relative_to(folder))
        )
    )
    key = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    memory = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    if memory.is_file():
        return memory.read_text()
    total = hashlib.sha256()
    for path in files:
        if model.is_dir():
            total.update(str(path.relative_to(folder)).encode())
        total.update(bytes.fromhex(file_sha256(path)))
    with contextlib.suppress(OutputError):  # a read-only home: the hash is right all the same
        write_file(memory, total.hexdigest().encode())
    return total.hexdigest()


def _of_a_net(path: Path) -> bool:
    """Whether a path in a base's folder is in a folder for a ControlNet: `controlnet`, `controlnet-canny`, ..."""
    return len(path.parts) > 1 and path.parts[0].startswith("controlnet")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
