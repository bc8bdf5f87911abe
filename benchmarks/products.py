"""The attainable roofline: how long the products of a computation take alone, each at its own shapes.

Convolutions, matrix products and attention are recorded while a function runs; each distinct one is then timed by
itself on random numbers, and the times are added up. Nothing that computes the same products with the same kernels is
quicker.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "mkldnn_rnn")


class Recorder(TorchDispatchMode):
    """Counts the products of what runs inside of it, by their operation, shapes, layouts and types."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[tuple] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in PRODUCTS or name.startswith("_scaled_dot_product"):
            known = tuple(_described(one) for one in args)
            self.calls[function, known, tuple((kwargs or {}).items())] += 1
        return function(*args, **(kwargs or {}))


def _described(one: Any) -> Any:
    if isinstance(one, Tensor):
        return "tensor", tuple(one.shape), tuple(one.stride()), one.dtype, one.device
    return tuple(one) if isinstance(one, list) else one


def _made(one: Any) -> Any:
    if isinstance(one, tuple) and one and one[0] == "tensor":
        _, shape, stride, dtype, device = one
        cells = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))  # rows may share memory
        return torch.randn(cells, dtype=dtype, device=device).mul_(0.05).as_strided(shape, stride)
    return list(one) if isinstance(one, tuple) else one


@torch.no_grad()
def products_alone(function: Callable[[], Any]) -> tuple[float, float, dict[str, float]]:
    """Seconds of all products of a function, their operations (2 per multiplication and addition), and the seconds by
    name of operation."""
    with FlopCounterMode(display=False) as counter, Recorder() as recorder:
        function()
    seconds: dict[str, float] = {}
    for (operation, described, options), count in recorder.calls.items():
        arguments = [_made(one) for one in described]
        name = operation.overloadpacket.__name__
        once = timed(lambda o=operation, a=arguments, k=dict(options): o(*a, **k), arguments)
        seconds[name] = seconds.get(name, 0) + count * once
    return sum(seconds.values()), float(counter.get_total_flops()), seconds


def timed(run: Callable[[], Any], arguments: list[Any]) -> float:
    """Median seconds of one call; on a GPU of 20 in a graph, so that no start is counted."""
    first = next(one for one in arguments if isinstance(one, Tensor))
    if first.device.type != "cuda":
        run()
        return statistics.median(_seconds(run) for _ in range(3))
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            run()
    graph.replay()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return statistics.median(_seconds(replay) for _ in range(3)) / 20


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
