"""The state of a training run: everything that it needs to go on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from controlnet.model.training.optimizers import make_optimizer
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
    """Parameters, their moving average, optimiser, loss scaler and progress of the training of a module."""

    def __init__(self, module: nn.Module, optimizer: str, learning_rate: float, weight_decay: float, precision: str):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer_is, self.weight_decay = optimizer, weight_decay
        self.optimizer = make_optimizer(module, optimizer, learning_rate, weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.progress = Progress()

    def load(self, saved: dict[str, Any]) -> None:
        """Restore what `saved` returned. The moments of another optimiser are of no use and are not restored."""
        torch._foreach_copy_([p.data for p in self.parameters], saved["parameters"])
        torch._foreach_copy_(self.ema, saved["ema"])
        if saved.get("optimizer_is", "adamw") == self.optimizer_is:
            self.optimizer.load_state_dict(saved["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.weight_decay
        self.scaler.load_state_dict(saved["scaler"])
        self.progress = Progress(**saved["progress"])

    def saved(self) -> dict[str, Any]:
        return {
            "parameters": [p.detach() for p in self.parameters],
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "optimizer_is": self.optimizer_is,
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self, norm: float) -> float:
        """Clip the whole gradient to `norm`; returns the norm that it had."""
        self.scaler.unscale_(self.optimizer)
        return float(nn.utils.clip_grad_norm_(self.parameters, norm))

    def update(self, rate: float, ema_decay: float) -> None:
        """One optimiser step at a learning rate, and an update of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        decay = min(ema_decay, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their moving average."""
        kept = [p.detach().clone() for p in self.parameters]
        try:
            self.keep_average()
            yield
        finally:
            torch._foreach_copy_([p.data for p in self.parameters], kept)

    def keep_average(self) -> None:
        torch._foreach_copy_([p.data for p in self.parameters], self.ema)

    @property
    def is_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.parameters)
