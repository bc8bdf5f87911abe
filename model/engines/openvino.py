"""OpenVINO: the networks as graphs compiled for the processor, kept on disk.

A graph is made once for the contents of a network and the shapes of a call: torch exports the walk, OpenVINO reads
that and saves it, and every later process reads the file. A graph of the UNet has control as an input, so scales,
windows and several ControlNets need no other one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from controlnet.model.control.attention import multiplies_halves
from controlnet.model.control.control import Control, grow
from controlnet.model.control.controlnet import halvings, skip_channels
from controlnet.model.control.prompt import Prompt
from controlnet.model.engines.calls import Call, Function, OfTensors, Unchanged
from controlnet.model.files.hashes import model_hash
from controlnet.model.files.mapping import Mapping
from controlnet.preprocessors.errors import UsageError, reason
from controlnet.preprocessors.files import beside, write_file
from controlnet.preprocessors.weights import cache_folder
from torch import Tensor, nn

RECIPE = 2
"""Counts what changes in the graphs of the same networks: 2 since control that is averaged keeps its size."""
KEPT = 16_000_000_000
"""Bytes of graphs on disk; those that were not used for longest are removed. Stable Diffusion 1.5's UNet is 1.7 GB."""
SHARED = 100_000
"""Bytes of a tensor from which on its memory is shared with the graph's file."""
SLOW = range(12_000, 25_000)
"""Tokens of which OpenVINO 2026.4 computes attention at half of torch's speed (benchmarks/LOG.md)."""
_CONSTANT = re.compile(r'<data element_type="\w+" shape="[^"]*" offset="(?P<offset>\d+)" size="(?P<size>\d+)"')


def load_openvino() -> Any:
    """The library. Raises UsageError if it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report every use of it
    try:
        import openvino
    except ImportError:
        raise UsageError(
            "the engine openvino needs OpenVINO, which is not installed", "pip install 'controlnet-toolkit[openvino]'"
        ) from None
    return openvino


@cache
def core() -> Any:
    """OpenVINO's core, one for the process and never given back: with it would go the stack on which this process
    handles signals, which OpenVINO replaces (a larger one, for AMX)."""
    return load_openvino().Core()


class OpenVino(OfTensors):
    """The engine, for networks of float32 or bfloat16 on a CPU. What OpenVINO cannot make a graph of is run by torch;
    `say` is told."""

    name = "openvino"
    alone = True

    def __init__(self, say: Callable[[str], None] = lambda text: None):
        super().__init__()
        self.ov, self.say = load_openvino(), say
        self.core = core()
        self._contents: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

    def predict(self, unet: Any, z: Tensor, time: Tensor, prompt: Prompt, control: Control | None) -> Tensor:
        return super().predict(unet, z, time, prompt, whole(control, unet.config, z, len(prompt)))

    def weights(self, network: Any, path: Path, part: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """From the file of a graph of the same model and part in this type, if there is one."""
        if dtype is None:
            return {}
        self._contents[network] = f"{model_hash(path)} {part} {dtype}"
        try:
            folder = cache_folder() / "graphs" / json.loads(self._index(network).read_text())
            return kept_tensors(network, folder, dtype) if is_whole(folder) else {}
        except (OSError, ValueError):
            return {}

    def make(self, call: Call) -> Function:
        if most_tokens(call.network.config, call.tensors[0]) in SLOW and multiplies_halves():
            self.say("torch runs the networks at this size: its attention is the quicker one here")
            return call.of_tensors()
        folder = self._folder(call)
        try:
            if not is_whole(folder):
                height, width = (8 * side for side in call.tensors[0].shape[-2:])
                self.say(f"OpenVINO: a graph for {width}x{height} is made, once for a model and size")
                self._save(call, folder)
            (folder / "used").touch()
            write_file(self._index(call.network), json.dumps(folder.name).encode())
            for name, tensor in kept_tensors(call.network, folder, call.tensors[0].dtype).items():
                call.network.get_parameter(name).data = tensor
            return self._compiled(folder, call.tensors)
        except Exception as error:  # OpenVINO fails in a dozen ways
            self.say(f"OpenVINO cannot run this network, torch does: {reason(error)}")
            return call.of_tensors()

    def _compiled(self, folder: Path, tensors: list[Tensor]) -> Function:
        half = tensors[0].dtype == torch.bfloat16 and "BF16" in self.core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        )
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        weights = numbers_of(folder)
        shared = self.ov.Tensor(np.frombuffer(weights, np.uint8), shared_memory=True)
        with weights.forgotten():  # it makes its own of nearly all
            model = self.core.read_model((folder / "graph.xml").read_text(), shared)
            compiled = self.core.compile_model(model, "CPU", options)
        return Request(self.ov, compiled, weights)

    def _folder(self, call: Call) -> Path:
        """Where the graph of a call is kept: by what the network is and holds, the call, and all versions that made
        it."""
        if call.network not in self._contents:
            digests = digests_of(call.network)
            self._contents[call.network] = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        _, *structure = call.key
        versions = [version(name) for name in ("controlnet-toolkit", "openvino", "torch", "diffusers")]
        config = sorted((key, str(value)) for key, value in call.network.config.items() if not key.startswith("_"))
        what = type(call.network).__name__, call.function.__qualname__
        text = f"{self._contents[call.network]} {what} {config} {structure} {versions} {RECIPE}"
        return cache_folder() / "graphs" / hashlib.sha256(text.encode()).hexdigest()[:32]

    def _index(self, network: Any) -> Path:
        """The file that names a folder with this network's weights."""
        name = hashlib.sha256(self._contents[network].encode()).hexdigest()[:32]
        return cache_folder() / "graphs" / f"{name}.json"

    def _save(self, call: Call, folder: Path) -> None:
        tensors = tuple(one.contiguous() for one in call.tensors)
        with torch.no_grad(), contiguous(call.network), beside(folder) as place:
            place.mkdir()
            exported = torch.export.export(_Module(call), tensors)
            model = self.ov.convert_model(exported)
            # One shape is quicker than any shape.
            model.reshape({source: list(one.shape) for source, one in zip(model.inputs, tensors, strict=True)})
            self.ov.save_model(model, place / "graph.xml", compress_to_fp16=False)
            del model
            (place / "weights.json").write_text(json.dumps(places_of(call.network, place)))
            sizes = {one.name: one.stat().st_size for one in place.iterdir()}
            (place / "sizes.json").write_text(json.dumps(sizes))
        forget_old(folder.parent)


class Request:
    """A compiled graph as a function of tensors."""

    def __init__(self, ov: Any, compiled: Any, weights: Any = None):
        self.ov, self.request, self.unchanged = ov, compiled.create_infer_request(), Unchanged()
        self.weights = weights  # lives as long
        self.inputs: dict[int, Any] = {}
        types = {"bf16": torch.bfloat16, "f32": torch.float32}
        self.outputs = [(tuple(one.shape), types[one.element_type.get_type_name()]) for one in compiled.outputs]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        for k in self.unchanged.new(tensors):
            self.inputs[k] = self._shared(tensors[k].contiguous())
            self.request.set_input_tensor(k, self.inputs[k][0])
        results = [torch.empty(shape, dtype=dtype) for shape, dtype in self.outputs]
        shared = [self._shared(one) for one in results]
        for k, (one, _) in enumerate(shared):
            self.request.set_output_tensor(k, one)
        self.request.infer()
        return results

    def _shared(self, tensor: Tensor) -> tuple[Any, Any]:
        """A tensor of OpenVINO with the memory of one of torch, and what must live as long."""
        if tensor.dtype == torch.bfloat16:  # numpy has no such type
            array = tensor.view(torch.int16).numpy()
            return self.ov.Tensor(array, list(tensor.shape), self.ov.Type.bf16), array
        array = tensor.numpy()
        return self.ov.Tensor(array, shared_memory=True), array


class _Module(nn.Module):
    """A call as a module, as torch's export takes it."""

    def __init__(self, call: Call):
        super().__init__()
        self.network, self.run = call.network, call.of_tensors()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run(*tensors))


def whole(control: Control | None, config: Any, z: Tensor, rows: int) -> Control:
    """Control with every residual of a UNet, at its full size and of all rows; zeros where there is none. So one graph
    serves every choice of controls."""
    control = control or Control([], None)
    sides = [tuple(z.shape[-2:])]
    for halves in halvings(dict(config)):
        sides.append(tuple((side + 1) // 2 for side in sides[-1]) if halves else sides[-1])
    shapes = [(rows, width, *side) for width, side in zip(skip_channels(dict(config)), sides, strict=True)]
    shapes.append(shapes[-1])  # the middle's
    given = control.down + ([] if control.middle is None else [control.middle])
    residuals = [
        grow(one, rows).expand(shape) for one, shape in zip(given, shapes, strict=True)
    ] if given else [z.new_zeros(1).expand(shape) for shape in shapes]  # fmt: skip
    return Control(residuals[:-1], residuals[-1], [grow(one, rows) for one in control.inner])


def most_tokens(config: Any, z: Tensor) -> int:
    """The tokens of a network's largest attention, for latents z (B, C, h, w); 0 if it has none."""
    height, width = z.shape[-2:]
    for k, block in enumerate(config["down_block_types"]):
        if block.startswith("CrossAttn"):
            return (height * width) >> (2 * k)
    return 0


def digests_of(network: nn.Module) -> dict[str, str]:
    """A hash of type, shape and numbers of each of a network's tensors, by name."""

    def digest(tensor: Tensor) -> str:
        head = f"{tuple(tensor.shape)} {tensor.dtype} "
        return head + _sha256(_bytes(tensor))

    state = network.state_dict()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(state, pool.map(digest, state.values()), strict=True))


def places_of(network: nn.Module, folder: Path) -> dict[str, int]:
    """Where in a graph's file the tensors of its network are, in bytes: those that are there with the same numbers."""
    data = np.memmap(folder / "graph.bin", np.uint8, "r")
    known = {}
    for constant in _CONSTANT.finditer((folder / "graph.xml").read_text()):
        offset, size = int(constant["offset"]), int(constant["size"])
        if size >= SHARED:
            known[size, _sha256(data[offset : offset + size])] = offset
    found = {}
    for name, parameter in network.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if size >= SHARED:
            place = known.get((size, _sha256(_bytes(parameter))))
            if place is not None:
                found[name] = place
    return found


_numbers: WeakValueDictionary[Path, Mapping] = WeakValueDictionary()


def numbers_of(folder: Path) -> Mapping:
    """The weights of a graph in memory, mapped once: for OpenVINO and for torch."""
    mapping = _numbers.get(folder)
    if mapping is None:
        _numbers[folder] = mapping = Mapping.of_file(folder / "graph.bin")
    return mapping


def kept_tensors(network: nn.Module, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those parameters of a network that are in a graph's file, by name, in the memory of that file: they take none of
    their own, and all processes share it."""
    places = json.loads((folder / "weights.json").read_text())
    numbers = numbers_of(folder)
    return {
        name: numbers.tensor(dtype, parameter.shape, places[name])
        for name, parameter in network.named_parameters()
        if name in places
    }


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a graph on disk is there with all of its bytes."""
    try:
        sizes = json.loads((folder / "sizes.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def forget_old(folder: Path) -> None:
    """Remove the graphs that were not used for longest: as many as make the others KEPT bytes or less. The newest
    stays."""

    def used(graph: Path) -> float:
        mark = graph / "used"
        return mark.stat().st_mtime if mark.exists() else graph.stat().st_mtime

    graphs = sorted((one for one in folder.iterdir() if one.is_dir()), key=used, reverse=True)
    total = 0
    for k, graph in enumerate(graphs):
        total += sum(file.stat().st_size for file in graph.iterdir())
        if k and total > KEPT:
            shutil.rmtree(graph, ignore_errors=True)


@contextmanager
def contiguous(network: nn.Module) -> Iterator[None]:
    """A network with its weights in torch's plain layout: OpenVINO's reader takes channels_last for it."""
    nn.Module.to(network, memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        nn.Module.to(network, memory_format=torch.channels_last)
