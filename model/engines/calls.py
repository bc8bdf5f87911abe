"""A call of a network as tensors alone, as graphs take it: the arguments taken apart, and put together again.

The keys and values of the prompt are among the tensors, so that no graph computes them, and none depends on a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import repeat
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from controlnet.model.control.control import Control
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.net import Net
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import predict, read_prompt
from torch import Tensor

TENSOR = "tensor"
"""Stands for a tensor in a template."""
Function = Callable[..., list[Tensor]]
"""Tensors -> tensors."""


@dataclass
class Call:
    """`function(network, z, time, prompt, more)`, for example `unet.predict` with a Control."""

    function: Callable[..., Any]
    network: Any
    arguments: tuple[Any, ...]
    """z, time, prompt, and a Control or a feature."""

    def __post_init__(self):
        z, time, prompt, more = self.arguments
        pairs = read_prompt(self.network, prompt)
        parts = (z, time, prompt.pooled, prompt.ids, pairs, more)
        self.tensors: list[Tensor] = list(leaves(parts))
        self._template = rebuilt(parts, repeat(TENSOR))
        self._rows = len(prompt)

    @property
    def key(self) -> tuple:
        """What tells it from calls that another graph is made for: structure, shapes and types."""
        shapes = tuple((tuple(one.shape), one.dtype) for one in self.tensors)
        return self.function, self._rows, str(self._template), shapes

    def of_tensors(self) -> Callable[..., list[Tensor]]:
        """The call as a function of its tensors, which returns the result's."""
        function, network, template, rows = self.function, self.network, self._template, self._rows

        def run(*tensors: Tensor) -> list[Tensor]:
            z, time, pooled, ids, pairs, more = rebuilt(template, iter(tensors))
            return list(leaves(function(network, z, time, ReadPrompt(rows, pooled, ids, pairs), more)))

        return run


class OfTensors:
    """What engines share that make a graph for each network and each shape: `made` once, then called."""

    name: str
    alone = False
    kept = 4
    """Graphs per network."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Any, OrderedDict[tuple, Function]] = WeakKeyDictionary()

    def weights(self, network: Any, path: Path, part: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {}

    def make(self, call: Call) -> Function:
        """A graph of the call, as a function of its tensors."""
        raise NotImplementedError

    def control(self, net: Net, z: Tensor, time: Tensor, prompt: Prompt, feature: Any) -> Control:
        if not isinstance(net, ControlNet):  # a T2I-Adapter computes nothing here
            return net.control(z, time, prompt, feature)
        *down, middle = self._run(type(net).control, net, z, time, prompt, feature)
        return Control(down, middle)

    def predict(self, unet: Any, z: Tensor, time: Tensor, prompt: Prompt, control: Control | None) -> Tensor:
        return self._run(predict, unet, z, time, prompt, control)[0]

    def _run(self, function: Callable[..., Any], network: Any, *arguments: Any) -> list[Tensor]:
        call = Call(function, network, arguments)
        key, made = call.key, self._made.setdefault(network, OrderedDict())
        if key not in made:
            while len(made) >= self.kept:
                made.popitem(last=False)
            made[key] = self.make(call)
        made.move_to_end(key)
        return made[key](*call.tensors)


class Unchanged:
    """Which tensors are the very same as the last time: keys and values of the prompt, the condition's feature."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[ref[Tensor], int]] = {}

    def new(self, tensors: Sequence[Tensor]) -> list[int]:
        """The places of those that are not."""
        return [k for k, one in enumerate(tensors) if not self._knows(k, one)]

    def _knows(self, place: int, one: Tensor) -> bool:
        last, version = self._last.get(place, (None, 0))
        if last is not None and last() is one and version == one._version:
            return True
        self._last[place] = ref(one), one._version
        return False


class ReadPrompt(Prompt):
    """A prompt of which the keys and values are given, in the order in which the walk asks for them."""

    def __init__(self, rows: int, pooled: Tensor | None, ids: Tensor | None, pairs: Sequence[tuple[Tensor, Tensor]]):
        self.pooled, self.ids, self.pairs = pooled, ids, list(pairs)
        self.count, self.next = rows, 0

    def __len__(self) -> int:
        return self.count

    def keys_values(self, attention: Any, compute: Callable) -> tuple[Tensor, Tensor]:
        pair = self.pairs[self.next]
        self.next += 1
        return pair


def leaves(thing: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dataclasses, in order."""
    if isinstance(thing, Tensor):
        yield thing
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from leaves(getattr(thing, field.name))
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            yield from leaves(one)


def rebuilt(thing: Any, tensors: Iterator[Any]) -> Any:
    """The same thing with others in the places of its tensors."""
    if thing is TENSOR or isinstance(thing, Tensor):
        return next(tensors)
    if is_dataclass(thing) and not isinstance(thing, type):
        return type(thing)(*[rebuilt(getattr(thing, field.name), tensors) for field in fields(thing)])
    if isinstance(thing, (list, tuple)):
        return type(thing)([rebuilt(one, tensors) for one in thing])
    return thing
