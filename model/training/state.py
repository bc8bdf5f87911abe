"""The state of a training run: everything that it needs to go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from controlnet.model.training.optimizers import make_optimizer
from controlnet.model.training.parallel import Parallel, like, local
from controlnet.preprocessors.errors import UsageError
from torch import Tensor, nn


@dataclass
class Progress:
    """Where a loop stands."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """Mean over the steps of the last log line."""
    first_loss: float = math.nan
    """The validation loss before step 1, else the loss of step 1; an explosion is measured by it."""
    best_loss: float = math.inf
    """The lowest validation loss, reached at `best_step`."""
    best_step: int | None = None
    window: list[float] = field(default_factory=list)
    """Losses since the last log line."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last RECENT steps."""


class State:
    """Parameters, their moving average, optimiser, loss scaler and progress of the training of a module.

    `module` is what several processes share: it must be called for its gradients to be averaged. Where FSDP2 shards it,
    parameters, average and moments are DTensors.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: str,
        learning_rate: float,
        weight_decay: float,
        precision: str,
        parallel: Parallel,
    ):
        made = make_optimizer(module, optimizer, learning_rate, weight_decay)
        self.module, self.optimizer = parallel.prepare(module, made)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer_is, self.weight_decay, self.parallel = optimizer, weight_decay, parallel
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.progress = Progress()

    def load(self, saved: dict[str, Any]) -> None:
        """Restore what `saved` returned. The moments of another optimiser are of no use and are not restored. Raises
        UsageError for the state of another network."""
        if [p.shape for p in saved["parameters"]] != [p.shape for p in self.parameters]:
            raise UsageError(
                "the checkpoint is of a network of another shape, so training cannot go on from it",
                "the base and settings that the run had; or start anew without --resume",
            )
        for own, kept in ((self.parameters, saved["parameters"]), (self.ema, saved["ema"])):
            values = [like(value, p) for value, p in zip(kept, own, strict=True)]
            torch._foreach_copy_(locals_of(own), locals_of(values))
        if self.parallel.zero:
            self.parallel.zero.take_parameters()
        if saved.get("optimizer_is", "adamw") == self.optimizer_is:
            self._load_optimizer(saved["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.weight_decay
        if saved["scaler"]:  # empty where it was not float16
            self.scaler.load_state_dict(saved["scaler"])
        self.progress = Progress(**saved["progress"])

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        moments = {
            number: {name: like(value, self.parameters[number]) for name, value in kept.items()}
            for number, kept in saved["state"].items()
        }
        self.optimizer.load_state_dict(saved | {"state": moments})

    def with_moments(self) -> dict[str, Any]:
        """`saved`, with the optimiser's moments there even before its first step, so that shards can be read into
        them."""
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.saved()

    def saved(self) -> dict[str, Any]:
        """All of it as nested dictionaries and lists; tensors are not copied."""
        return {
            "parameters": [p.detach() for p in self.parameters],
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "optimizer_is": self.optimizer_is,
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }

    def backward(self, loss: Tensor) -> None:
        self.parallel.backward(self.scaler.scale(loss))

    def clip(self, norm: float) -> float:
        """Clip the whole gradient to `norm`; returns the norm that it had."""
        self.scaler.unscale_(self.optimizer)
        return self.parallel.clip(self.parameters, norm)

    def update(self, rate: float, ema_decay: float) -> None:
        """One optimiser step at a learning rate, and an update of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        decay = min(ema_decay, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(locals_of(self.ema), locals_of(self.parameters), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their moving average, whole in every process."""
        kept = [p.clone() for p in locals_of(self.parameters)]
        try:
            self.keep_average()
            with self.parallel.whole(self.module):
                yield
        finally:
            torch._foreach_copy_(locals_of(self.parameters), kept)

    def keep_average(self) -> None:
        torch._foreach_copy_(locals_of(self.parameters), locals_of(self.ema))

    @property
    def is_finite(self) -> bool:
        """The same in all processes."""
        return not self.parallel.any(not all(bool(p.isfinite().all()) for p in locals_of(self.parameters)))


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of tensors, without their gradients."""
    return [local(tensor.detach()) for tensor in tensors]
