"""Models from the model hub: fetched once, pinned to a revision, and found again without a network.

models.lock.json in the cache folder holds for each OWNER/NAME the newest revision at the time of the first fetch, and
the sha256 of its files. Only files that are read are fetched.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from controlnet.model.files.hashes import file_sha256
from controlnet.model.files.ids import is_hub_id
from controlnet.model.files.stored import BASE_PARTS, EMBEDDING_FILES, LORA_FILES, STEMS, TOKENIZERS
from controlnet.model.files.tensors import shards_of, weights_among
from controlnet.preprocessors.errors import ModelError, OutputError, UsageError
from controlnet.preprocessors.files import exists
from controlnet.preprocessors.weights import add_to_lock, cache_folder, read_lock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

_NETWORK: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
"""What the client raises when the network fails. The list depends on its HTTP library, which has changed before."""


def find(name: str, offline: bool, example: str) -> Path:
    """The path of a model: a folder or file as given, or that of a hub id, which is fetched if it is not here yet.

    Raises UsageError for a name that is neither, ModelError for a model that cannot be fetched.
    """
    if exists(name):
        return Path(name)
    if not is_hub_id(name):
        raise UsageError(f"{name}: no such folder or file, and not a hub id of the form OWNER/NAME", example)
    if folder := kept(name):
        return folder
    if offline:
        raise ModelError(
            f"{name}: not on this machine, and the model hub was not asked (--offline)",
            f"with a network: controlnet models pull {name}; or give a folder in diffusers' layout",
        )
    return pull(name)


def kept(name: str) -> Path | None:
    """The folder of a hub id, if all its files are on this machine, else None. The revision is the one in the lock file
    or, without an entry there, the one that another program fetched."""
    locked = revisions().get(name)
    try:
        folder = Path(snapshot_download(name, revision=locked and locked["revision"], local_files_only=True))
    except OSError:
        return None
    here = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    whole = set(locked["files"]) <= set(here) if locked else complete(here)
    return folder if whole else None


def pull(name: str, update: bool = False) -> Path:
    """Fetch a hub id, check it and lock it. The revision is the locked one, or the newest with `update` or without an
    entry in the lock file.

    Raises ModelError when it cannot be fetched, is not a model, or differs from what the hub or the lock file says.
    """
    locked = None if update else revisions().get(name)
    try:
        info = HfApi().model_info(name, revision=locked and locked["revision"], files_metadata=True)
        files = needed([file.rfilename for file in info.siblings or []])
        if not complete(files):
            raise ModelError(f"{name}: holds neither a base nor a ControlNet in diffusers' layout, nor one adapter")
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
        told = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
        if wrong := _differing(folder, files, told):  # a damaged copy in the hub's cache
            snapshot_download(name, revision=info.sha, allow_patterns=wrong, force_download=True)
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: the model hub has no such model, or it is not public", "controlnet models list"
        ) from error
    except _NETWORK as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise OutputError(
                f"{name}: cannot be kept ({os.strerror(error.errno)})",  # type: ignore[attr-defined]
                "free some disk, or HF_HOME=DIR for another place",
            ) from error
        if not (locked or update) and (there := kept(name)):
            return there
        raise ModelError(
            f"{name}: no such folder, and the model hub cannot be reached ({type(error).__name__})",
            "with a network, run the same command again; or give a folder in diffusers' layout",
        ) from error
    if wrong := _differing(folder, files, told | (locked["files"] if locked else {})):
        raise ModelError(
            f"{name}: {wrong[0]} is not the file that it was when it was fetched first",
            f"controlnet models pull --update {name}, if a newer one is wanted",
        )
    digests = {file: file_sha256(folder / file) for file in files}
    add_to_lock(_lock_file(), name, {"revision": info.sha, "files": digests})
    return folder


def verify(name: str) -> list[str]:
    """Files of a locked hub id that are missing or have changed. Raises ModelError for an id that is not locked."""
    locked = revisions().get(name)
    if locked is None:
        raise ModelError(f"{name}: was not fetched by this toolkit", f"controlnet models pull {name}")
    folder = kept(name)
    return list(locked["files"]) if folder is None else _differing(folder, locked["files"], locked["files"])


def needed(files: Iterable[str]) -> list[str]:
    """The files of a repository that loading reads: configs, tokenizers, one set of weights per part; or that of an
    adapter."""
    files = list(files)
    if adapter := _adapter(files):
        return [adapter, *(["adapter_config.json"] if "adapter_config.json" in files else [])]
    is_base = "model_index.json" in files
    folders = (*BASE_PARTS, *TOKENIZERS, "scheduler") if is_base else ("",)
    chosen = ["model_index.json"] if is_base else []
    for folder in folders:
        inside = [f.removeprefix(f"{folder}/") for f in files if f.startswith(f"{folder}/")] if folder else files
        stem = STEMS.get(folder or "controlnet")
        if stem is None:
            own = [name for name in inside if name.endswith((".json", ".txt", ".model"))]
        else:
            first = weights_among(inside, stem)
            own = ["config.json", *([first, *shards_of(inside, first)] if first else [])]
        chosen += [f"{folder}/{name}" if folder else name for name in own if name in inside]
    return chosen


def complete(files: Iterable[str]) -> bool:
    """Whether these files make a whole base or ControlNet (config and weights of every part), or hold an adapter."""
    files = set(files)
    if _adapter(files):
        return True
    if "model_index.json" not in files:
        return _has_network(files, "", "controlnet")
    folders = {file.split("/")[0] for file in files if "/" in file}
    second = {"text_encoder_2", "tokenizer_2"}
    expected = {*BASE_PARTS, *TOKENIZERS, "scheduler"} - (second if not folders & second else set())
    return expected <= folders and all(_has_network(files, f"{part}/", part) for part in expected & set(BASE_PARTS))


def _adapter(files: Iterable[str]) -> str | None:
    """The file of a LoRA or of textual inversion among those of a repository that holds nothing else."""
    files = set(files)
    if files & {"model_index.json", "config.json"}:
        return None
    known = next((name for name in (*LORA_FILES, *EMBEDDING_FILES) if name in files), None)
    alone = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    return known or (alone[0] if len(alone) == 1 else None)


def _has_network(files: set[str], folder: str, part: str) -> bool:
    """Whether the files hold a part's config and all its weights."""
    inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
    first = weights_among(inside, STEMS[part])
    if "config.json" not in inside or first is None:
        return False
    return not first.endswith(".json") or bool(shards_of(inside, first))


def revisions() -> dict[str, Any]:
    """hub id -> revision and files with their sha256."""
    return read_lock(_lock_file())


def _lock_file() -> Path:
    return cache_folder() / "models.lock.json"


def _differing(folder: Path, files: Iterable[str], told: dict[str, str]) -> list[str]:
    return [f for f in files if f in told and not ((folder / f).is_file() and file_sha256(folder / f) == told[f])]
