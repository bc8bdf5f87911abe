"""Files of tensors: safetensors, and pickles read with weights_only, which runs no code in them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from controlnet.preprocessors.errors import ModelError, OutputError, reason
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Header:
    """A tensor as a file's header tells it."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path, what: str) -> dict:
    """A JSON object from a model folder. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"{path}: missing; expected {what}", f"ls {path.parent}")
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error


def weights_among(names: Iterable[str], stem: str) -> str | None:
    """Of the names in a folder the file that holds the weights `stem`, or the index of its shards: safetensors before
    pickles, whole precision before the fp16 variant."""
    pickled = "pytorch_model" if stem == "model" else stem
    order = (
        f"{stem}.safetensors.index.json", f"{stem}.safetensors", f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors", f"{pickled}.bin.index.json", f"{pickled}.bin", f"{pickled}.fp16.bin",
    )  # fmt: skip
    names = set(names)
    return next((name for name in order if name in names), None)


def shards_of(names: Iterable[str], index: str) -> list[str]:
    """The names in a folder that look like shards of an index file; none for a file that is no index."""
    stem, ending, *rest = index.removesuffix(".json").split(".")
    shard = re.compile(rf"{re.escape(stem)}(\.fp16)?-\d+-of-\d+(\.fp16)?\.{ending}")
    found = {name: match for name in names if (match := shard.fullmatch(name))}
    return sorted(n for n, m in found.items() if ("fp16" in rest) == bool(m[1] or m[2])) if "index" in rest else []


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold the weights `stem` of a folder: one, or the shards of an index. Raises ModelError when there
    are none."""
    first = weights_among((p.name for p in folder.glob("*")), stem)
    if first is None:
        raise ModelError(f"{folder}: no {stem}.safetensors", f"ls {folder}")
    if first.endswith(".json"):
        return [folder / name for name in sorted(set(read_json(folder / first, "")["weight_map"].values()))]
    return [folder / first]


def read_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `weight_files`."""
    return {name: tensor for file in weight_files(folder, stem) for name, tensor in read_tensors(file).items()}


def read_header(path: Path) -> tuple[dict[str, Header], dict[str, str]]:
    """Names, types and shapes of a file's tensors, and its metadata. Raises ModelError for what cannot be read."""
    if is_safetensors(path):
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                headers = {k: Header(_dtype(s.get_dtype()), tuple(s.get_shape())) for k, s in slices.items()}
                return headers, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    tensors = _read_pickle(path)
    return {k: Header(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in tensors.items()}, {}


def read_tensors(path: Path, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a file, or the wanted ones."""
    if not is_safetensors(path):
        tensors = _read_pickle(path)
        return tensors if wanted is None else {name: tensors[name] for name in wanted}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if wanted is None else wanted)}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not there. Raises OutputError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, {"format": "pt"} | (metadata or {}))
        temporary.chmod(mode)  # safetensors leaves it readable by its owner alone
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{path}: cannot be written ({error})", "free some disk, or another place") from error
    finally:
        temporary.unlink(missing_ok=True)


class _Inert:
    """Stands for the one class that old .ckpt files of bases name; it is never made, and does nothing."""


def _read_pickle(path: Path) -> dict[str, Tensor]:
    admitted = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
    try:
        with torch.serialization.safe_globals(admitted):  # type: ignore[arg-type]
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the old format has no memory map
                found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_refusal(error):
            raise ModelError(
                f"{path}: the pickle holds more than tensors; it was refused and nothing in it was run",
                "convert it to safetensors where you trust it, or find a .safetensors of the model",
            ) from error
        raise _unreadable(path, error) from error
    except Exception as error:  # a cut or foreign file fails in a dozen ways
        raise _unreadable(path, error) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, expected tensors by name")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _is_refusal(error: Exception) -> bool:
    return "GLOBAL" in str(error) or ("weights_only" in str(error).lower() and "Unsupported" in str(error))


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path}: cannot be read as weights ({reason(error)})", "download the file again")


def is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _dtype(name: str) -> str:
    return {"F16": "float16", "F32": "float32", "BF16": "bfloat16", "F64": "float64"}.get(name, name.lower())
