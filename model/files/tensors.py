"""Files of tensors: safetensors, and pickles read with weights_only, which runs no code in them."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from controlnet.model.files.mapping import Mapping, Spare, forget
from controlnet.preprocessors.errors import ModelError, OutputError, reason
from controlnet.preprocessors.files import beside, not_written
from controlnet.preprocessors.jsons import read_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes. torch allocates memory at multiples of it; at other addresses some kernels round differently."""


@dataclass(frozen=True)
class Header:
    """What a file's header says about a tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path, what: str) -> dict:
    """A JSON object from a model folder. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"{path}: missing; expected {what}", f"ls {path.parent}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})", f"ls -l {path}") from error
    return read_object(text, str(path), ModelError, "download the file again")


def weights_among(names: Iterable[str], stem: str) -> str | None:
    """Of the file names in a folder, the one with the weights `stem`, or with the index of their shards. Safetensors
    come before pickles, full precision before the fp16 variant. None if there is none."""
    pickled = "pytorch_model" if stem == "model" else stem
    order = (
        f"{stem}.safetensors.index.json",
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors",
        f"{pickled}.bin.index.json",
        f"{pickled}.bin",
        f"{pickled}.fp16.bin",
    )
    names = set(names)
    return next((name for name in order if name in names), None)


def shards_of(names: Iterable[str], index: str) -> list[str]:
    """The file names in a folder that look like shards of an index; empty if `index` is not an index file."""
    stem, ending, *rest = index.removesuffix(".json").split(".")
    shard = re.compile(rf"{re.escape(stem)}(\.fp16)?-\d+-of-\d+(\.fp16)?\.{ending}")
    found = {name: match for name in names if (match := shard.fullmatch(name))}
    return sorted(n for n, m in found.items() if ("fp16" in rest) == bool(m[1] or m[2])) if "index" in rest else []


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files in a folder that hold the weights `stem`: one file, or the shards of an index. Raises ModelError when
    there are none."""
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
    """All tensors of a file, or the wanted ones; read when they are used."""
    if not is_safetensors(path):
        tensors = _read_pickle(path)
        return tensors if wanted is None else {name: tensors[name] for name in wanted}
    try:
        with safe_open(path, "pt") as file:  # it checks that the header fits the file
            names = list(file.keys() if wanted is None else wanted)
            headers = {name: file.get_slice(name) for name in names}
            types: dict[str, Any] = {k: getattr(torch, _dtype(one.get_dtype()), None) for k, one in headers.items()}
            others = {name: file.get_tensor(name) for name in names if types[name] is None}
        mapping = Mapping.of_file(path)
        start = 8 + int.from_bytes(mapping[:8], "little")
        places = {name: one["data_offsets"][0] for name, one in json.loads(mapping[8:start]).items() if name in types}
        return others | {
            name: mapping.tensor(types[name], headers[name].get_shape(), start + places[name])
            for name in names
            if name not in others
        }
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def is_float8(tensor: Tensor) -> bool:
    """Whether a tensor has one of the 8-bit types, which are for storage: nothing is computed in them."""
    return tensor.is_floating_point() and tensor.element_size() == 1


def fill(
    network: nn.Module,
    state: dict[str, Tensor],
    source: Path,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    kept: dict[str, Tensor] | None = None,
    low_memory: bool = False,
) -> None:
    """Give a network without numbers its tensors: checked, on a device, in a type (None: as they are), convolutions in
    channels_last. Those that are `kept` elsewhere, in that type already, are taken from there as they are. With
    `low_memory` each large one is in memory only while its layer works. Raises ModelError unless names, shapes and
    numbers fit."""
    check_names(network, state, source)
    kept = kept or {}
    spare = Spare(network, dtype) if low_memory and dtype is not None else None
    filled = {}
    for name, tensor in state.items():
        if name in kept:
            filled[name] = kept[name]
            continue
        check_finite({name: tensor}, source)
        if spare is not None:
            tensor = spare.keep(name, tensor)
        layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
        filled[name] = _aligned(tensor.to(device, dtype if tensor.is_floating_point() else None, memory_format=layout))
        if filled[name].data_ptr() != state[name].data_ptr():
            forget(state[name])
    network.load_state_dict(filled, assign=True)
    for name, buffer in network.named_buffers():
        if name not in filled:  # it is in no file
            buffer.data = buffer.to(device, dtype if buffer.is_floating_point() else None)


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor, copied if it does not begin at a multiple of ALIGNMENT. Where a tensor mapped from a file begins
    depends on the length of the file's header, but a network's results must depend on its tensors alone."""
    if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
        return tensor.clone(memory_format=torch.preserve_format)
    return tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises OutputError."""
    try:
        with beside(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, {"format": "pt"} | (metadata or {}))
            temporary.chmod(mode)  # safetensors leaves it readable by its owner alone
    except OSError as error:
        raise not_written(path, error) from error
    except SafetensorError as error:
        raise OutputError(f"{path}: cannot be written ({error})", "free some disk, or another place") from error


class _Inert:
    """Stands for the one class that old .ckpt files of bases refer to. It is never instantiated and does nothing."""


def read_pickle(path: Path) -> Any:
    """What a pickle holds, if that is tensors, numbers and texts in lists and dictionaries. Raises ModelError for
    anything else; nothing in it is run."""
    admitted = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"), nn.ParameterDict]
    try:
        with torch.serialization.safe_globals(admitted), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # of protocols and old forms: the file decides
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the old format has no memory map
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_refusal(path, error):
            raise ModelError(
                f"{path}: the pickle holds more than tensors; it was refused and nothing in it was run",
                "convert it to safetensors where you trust it, or find a .safetensors of the model",
            ) from error
        message = f"{path}: cannot be read as weights (no pickle of tensors)"
        raise ModelError(message, "download the file again") from error
    except Exception as error:  # a cut or foreign file fails in a dozen ways
        raise _unreadable(path, error) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    found = read_pickle(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, expected tensors by name")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _is_refusal(path: Path, error: Exception) -> bool:
    """Whether a pickle holds more than tensors, as opposed to a file that is cut off or not a pickle."""
    if zipfile.is_zipfile(path):
        return "GLOBAL" in str(error) or "Unsupported operand" in str(error)
    try:
        with open(path, "rb") as file:
            for _ in pickletools.genops(file):  # reads it, runs nothing
                pass
    except ValueError:
        return False
    return True


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path}: cannot be read as weights ({reason(error)})", "download the file again")


def is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _dtype(name: str) -> str:
    names = {
        "F16": "float16",
        "F32": "float32",
        "BF16": "bfloat16",
        "F64": "float64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
    }
    return names.get(name, name.lower())


def check_names(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Raises ModelError unless names and shapes of `state` fit `module`."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if missing := sorted(expected.keys() - state.keys()):
        raise ModelError(f"{source}: weights lack {len(missing)} tensors, among them {missing[0]}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ModelError(f"{source}: weights hold {len(unknown)} unexpected tensors, among them {unknown[0]}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(f"{source}: {name} has shape {tuple(state[name].shape)}, expected {shape}")


def check_finite(state: dict[str, Tensor], source: Path) -> None:
    """Raises ModelError when a tensor holds NaN or infinity."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # A NaN is the smallest and the largest of its tensor: one pass, ten times as quick as `isfinite`.
        extremes = torch.stack(torch.aminmax(tensor.half() if is_float8(tensor) else tensor))
        if not torch.isfinite(extremes).all():
            raise ModelError(f"{source}: {name} holds NaN or infinite numbers", "download or train the weights again")
