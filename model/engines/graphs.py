"""CUDA graphs: the work of an evaluation recorded once and replayed, so that the CPU does not slow the GPU down.

At batch 1 a UNet is a thousand small operations, and to start them takes longer than to compute them. A graph reads and
writes memory of its own, so arguments are copied in and results out.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from controlnet.model.control.upsampling import fold_for_graphs
from controlnet.model.engines.calls import Call, Function, OfTensors, Unchanged
from torch import Tensor


class Graphs(OfTensors):
    """The engine that records; for CUDA, with networks that stay where they are."""

    name = "graphs"

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.cuda.graph_pool_handle()

    def make(self, call: Call) -> Function:
        return Recorded(call.of_tensors(), call.tensors, self.pool)


class Compiled(OfTensors):
    """The engine that has torch compile each network, and records that on CUDA."""

    name = "compiled"

    def __init__(self, backend: str = "inductor") -> None:
        super().__init__()
        self.backend = backend
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def make(self, call: Call) -> Function:
        run: Any = call.of_tensors()
        fold_for_graphs(call.network)
        # With code of its own: torch compiles one piece of code a few times at most, and all calls have the same.
        own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
        compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=self.backend)
        return Recorded(compiled, call.tensors, self.pool) if call.tensors[0].is_cuda else compiled


class Recorded:
    """A function of tensors, recorded."""

    def __init__(self, function: Function, tensors: list[Tensor], pool: Any):
        self.inputs, self.unchanged = [tensor.clone() for tensor in tensors], Unchanged()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is chosen or compiled at a first call happens here
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function(*self.inputs)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        new = self.unchanged.new(tensors)
        torch._foreach_copy_([self.inputs[k] for k in new], [tensors[k] for k in new])
        self.graph.replay()
        return [one.clone() for one in self.outputs]
