"""The training loop that every network of this project is trained with: AdamW, EMA, atomic checkpoints, exact resume.

Knows neither what is trained nor on what data: it is given a module and a function from a step number to a loss. That
function draws all its randomness from the step number, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoopConfig:
    """How a loop optimises and when it stops: at `max_steps` or after `minutes`, whichever comes first."""

    max_steps: int = 1_000_000
    minutes: float = float("inf")
    """Training time of all runs into the same folder together; 0 takes what is there."""
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    """The last part of the run, over which the learning rate falls linearly to zero."""
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    save_every: float = 120.0
    """Seconds between checkpoints."""
    log_every: int = 50

    def __post_init__(self):
        for name in ("max_steps", "learning_rate", "save_every", "log_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.minutes < 0:
            raise ValueError(f"minutes must not be negative, got {self.minutes}")


@dataclass
class Progress:
    """Where a loop stands."""

    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")


def save_atomic(obj: object, path: Path) -> None:
    """torch.save under a temporary name, then rename: the file is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def fit(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: LoopConfig,
    folder: Path,
    report: Callable[[str], None] = print,
    on_log: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train `module` in place and leave its exponential moving average in it.

    loss_of(step) gives a scalar loss. Goes on from `folder/state.pt` if it is there; writes it every `save_every`
    seconds and at the end, and one JSON line a log to `folder/log.jsonl`. Raises FloatingPointError when the loss stops
    being finite; the last checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "state.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    ema = [p.detach().clone() for p in parameters]
    progress = Progress()
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=parameters[0].device)
        for target, source in zip(parameters, state["parameters"], strict=True):
            target.data.copy_(source)
        ema = [e.to(p.device) for e, p in zip(state["ema"], parameters, strict=True)]
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(state["step"], state["seconds"], state["loss"])
        report(f"{folder.name}: resumed at step {progress.step}")

    def save() -> None:
        state = {"parameters": [p.detach() for p in parameters], "ema": ema, "optimizer": optimizer.state_dict()}
        save_atomic(state | vars(progress), state_path)

    def done() -> float:
        spent = progress.seconds / 60 / config.minutes if config.minutes else 1.0
        return max(progress.step / config.max_steps, spent)

    module.train()
    last_save = last_tick = time.perf_counter()
    window: list[Tensor] = []
    while done() < 1:
        rate = min(1.0, (progress.step + 1) / config.warmup_steps)
        if config.decay_fraction:
            rate *= min(1.0, (1 - done()) / config.decay_fraction)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        loss = loss_of(progress.step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        decay = min(config.ema_decay, (1 + progress.step) / (10 + progress.step))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
        window.append(loss.detach())
        now = time.perf_counter()
        progress.seconds, last_tick = progress.seconds + now - last_tick, now
        if progress.step % config.log_every == 0:
            progress.loss = float(torch.stack(window).mean())
            window.clear()
            if progress.loss != progress.loss or progress.loss == float("inf"):
                raise FloatingPointError(f"the loss is {progress.loss} at step {progress.step}")
            line = {
                "step": progress.step,
                "seconds": round(progress.seconds, 1),
                "loss": progress.loss,
                "lr": rate * config.learning_rate,
            }
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            if on_log:
                on_log(progress)
        if now - last_save > config.save_every:
            save()
            last_save = now
    save()
    for parameter, average in zip(parameters, ema, strict=True):
        parameter.data.copy_(average)
    return progress
