"""Networks of torch for detectors: loaded once, on the device that is wanted, and shared by the threads that look at
photos. On a GPU the photos that wait at one time go through together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from controlnet.preprocessors.detectors.detector import On
from controlnet.preprocessors.devices import choose_device, choose_dtype
from controlnet.preprocessors.errors import ModelError, reason
from torch import Tensor, nn
from torch.utils._pytree import tree_map

TOGETHER = 8
"""The most photos in one batch on a GPU."""
Outputs = tuple[Tensor, ...]


class Network:
    """A network that one photo at a time is given to, from any thread.

    `forward` gets a batch (B, ...) on the device and returns tensors (B, ...). A call takes (1, ...) on the CPU and
    returns (1, ...) in float32 on the CPU. Numbers are those of `on`; without, bfloat16 if `half` and the processor
    multiplies it, else float32. `exact` names parts that always work in float32, because a map shows their steps."""

    def __init__(
        self,
        module: nn.Module,
        on: On,
        half: bool = False,
        forward: Callable[..., Any] | None = None,
        exact: tuple[str, ...] = (),
    ):
        self.device = choose_device(on.device)
        self.dtype = choose_dtype(on.dtype, self.device) if on.dtype else _best(self.device, half)
        self.module = module.eval().to(self.device, self.dtype)
        for name in exact if self.dtype != torch.float32 else ():
            module.get_submodule(name).float().register_forward_pre_hook(_in_float32, with_kwargs=True)
        self.forward = forward or module
        self.together = 1 if self.device.type == "cpu" else TOGETHER
        self._waiting: list[tuple[dict[str, Tensor], Future]] = []
        self._adding, self._running = Lock(), Lock()

    def __call__(self, **inputs: Tensor) -> Outputs:
        mine: Future = Future()
        with self._adding:
            self._waiting.append((inputs, mine))
        with self._running:
            # Whoever comes first takes the others that wait with it; when their turn comes they find theirs done.
            if not mine.done():
                self._run(self._batch(mine))
        return mine.result()

    def _batch(self, mine: Future) -> list[tuple[dict[str, Tensor], Future]]:
        """My call and others of the same shapes, at most `together`."""
        with self._adding:
            own = next(inputs for inputs, future in self._waiting if future is mine)
            like = [pair for pair in self._waiting if pair[1] is mine or _shapes(pair[0]) == _shapes(own)]
            like = sorted(like, key=lambda pair: pair[1] is not mine)[: self.together]
            self._waiting = [pair for pair in self._waiting if not any(pair is taken for taken in like)]
            return like

    def _run(self, batch: list[tuple[dict[str, Tensor], Future]]) -> None:
        try:
            inputs = {key: self._moved(torch.cat([one[key] for one, _ in batch])) for key in batch[0][0]}
            with torch.inference_mode():
                found = self.forward(**inputs)
            outputs = tuple(one.float().cpu() for one in (found if isinstance(found, tuple) else (found,)))
            for i, (_, future) in enumerate(batch):
                future.set_result(tuple(one[i : i + 1] for one in outputs))
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)


def _best(device: torch.device, half: bool) -> torch.dtype:
    """float16 is never taken by itself: it overflows in networks that were not trained for it, such as HED."""
    if not half:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return choose_dtype(None, device)


def _in_float32(module: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def cast(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(cast, given), tree_map(cast, named)


def _shapes(inputs: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: x.shape for key, x in inputs.items()}


@cache
def from_transformers(
    weights: Path, model: str, on: On, outputs: tuple[str, ...], half: bool = False, exact: tuple[str, ...] = ()
):
    """(the image processor, the Network) of a folder in transformers' layout. `model` names its class; the Network
    returns the model's `outputs`. Raises ModelError for a folder of something else."""
    import transformers

    try:
        processor = transformers.AutoProcessor.from_pretrained(weights, local_files_only=True)
        module = getattr(transformers, model).from_pretrained(weights, local_files_only=True, dtype=torch.float32)
    except Exception as error:  # transformers raises a dozen types for a folder of something else
        raise ModelError(f"{weights}: holds no network of {model} ({reason(error)[:200]})", "--weights DIR") from error

    def forward(**inputs: Tensor) -> Outputs:
        found = module(**inputs)
        return tuple(value for name in outputs if (value := getattr(found, name)) is not None)

    return processor, Network(module, on, half, forward, exact)
