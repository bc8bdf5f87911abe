"""The training loop of every network in this project: accumulation, validation, checkpoints, exact resume, several
processes.

It does not know what is trained, or on what data: it is given a module and a function from the number of a batch to a
loss. That function draws all its randomness from the number. So a resumed run repeats an uninterrupted one, and no
random state has to be saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.log import Log
from controlnet.model.training.optimizers import OPTIMIZERS
from controlnet.model.training.parallel import Parallel
from controlnet.model.training.precision import PRECISIONS
from controlnet.model.training.signals import Stop
from controlnet.model.training.state import Progress, State
from controlnet.preprocessors.errors import ControlNetError, Exit
from torch import Tensor, nn

EXPLODED = 4.0
"""Training has exploded when the mean of the recent losses is this many times the first loss. A single loss may be so
large by chance, from its noise and timestep."""
EXPLODED_AT_ONCE = 25.0
"""Noise alone never makes a single loss this many times the first one."""
RECENT = 50
"""How many steps count as recent; a fifth of them is enough to judge by."""


@dataclass(frozen=True)
class LoopConfig:
    """How a loop optimises and when it stops: at `max_steps` or after `minutes`, whichever comes first."""

    max_steps: int = 1_000_000
    """Optimiser steps; accumulated batches do not count."""
    minutes: float = float("inf")
    """Total training time in this folder, resumed runs included; 0 trains no further."""
    accumulation: int = 1
    """Batches whose gradients are averaged in one optimiser step."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (moments in 8 bits), or muon for matrices and adamw for the rest."""
    learning_rate: float = 1e-4
    """After the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    decay_fraction: float = 0.25
    """The last part of the run, over which the learning rate falls linearly to zero."""
    weight_decay: float = 1e-2
    """Each step shrinks the weights by this share times the learning rate."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which a run saves; it rises from 0.1 to this value over the first thousands of
    steps."""
    precision: str = "bfloat16"
    """float32, bfloat16 or float16; master weights and optimiser are float32 in any case."""
    save_every: float = 120.0
    """Seconds between checkpoints."""
    keep: int = 1
    """How many of the last checkpoints are kept, in addition to the best one."""
    log_every: int = 50
    """Steps between lines of the log."""
    validate_every: int = 100
    """Steps between validations on the held-out data."""

    def __post_init__(self):
        positive = ("max_steps", "accumulation", "learning_rate", "clip_norm", "save_every", "keep", "log_every")
        for name in (*positive, "validate_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if math.isinf(self.learning_rate):
            raise ValueError(f"learning_rate must be a number, got {self.learning_rate}")
        for name in ("minutes", "warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("decay_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name, choices in {"precision": PRECISIONS, "optimizer": OPTIMIZERS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


class ExplodedError(ArithmeticError):
    """The loss is not finite, or far above its first value. Every checkpoint is from before that."""


class OtherFailedError(ControlNetError):
    """Another process has an error, which it reports itself."""

    code = Exit.INTERRUPTED


def fit(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: LoopConfig,
    folder: Path,
    report: Callable[[str], None] = lambda text: None,
    validate: Callable[[Progress], dict[str, Any]] | None = None,
    on_validated: Callable[[Progress], None] = lambda progress: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    pairs: int = 0,
    fetch: Callable[[int], None] = lambda k: None,
) -> Progress:
    """Train `module` in place and leave its exponential moving average in it.

    loss_of(k) gives the scalar loss of batch k; one optimiser step takes `accumulation` of them. Goes on from the last
    checkpoint in `folder/checkpoints`. `validate` is called with the averaged weights in the module before the first
    step, every `validate_every` steps and at the end. It returns fields for the log; the step with the lowest
    `validation_loss` is the best one. `on_validated` is called when the fields are written. The log's last line says
    how the loop ended: finished, stopped (SIGTERM, SIGINT; after a checkpoint) or exploded. `fetch(k)` gets what
    loss_of(k) needs; if it fails in one of several processes, all save and stop. `pairs` is the number of
    samples in a step, for the throughput in the log. With several processes (parallel.py), each computes its own part
    of batch k, and gradients are averaged; the first one validates and writes, and all know what it found.

    Raises UsageError for settings that several processes cannot have, ExplodedError when the loss stops being finite
    or explodes, OSError when a checkpoint cannot be written; earlier checkpoints stay in both cases.
    """
    return _Loop(module, loss_of, config, folder, report, validate, on_validated, on_step, pairs, fetch).run()


class _Loss(nn.Module):
    """A module whose forward pass is the loss of batch k: what DDP and FSDP2 must see called."""

    def __init__(self, module: nn.Module, loss_of: Callable[[int], Tensor]):
        super().__init__()
        self.module, self.loss_of = module, loss_of

    def forward(self, k: int) -> Tensor:
        return self.loss_of(k)


class _Loop:
    """One call of `fit`."""

    def __init__(
        self, module, loss_of, config: LoopConfig, folder: Path, report, validate, on_validated, on_step, pairs, fetch
    ):
        self.module, self.config, self.folder, self.report = module, config, folder, report
        self.validate, self.on_validated, self.on_step = validate, on_validated, on_step
        self.pairs, self.fetch = pairs, fetch
        self.parallel = Parallel(next(module.parameters()).device)
        self.parallel.check(config.optimizer, config.precision)
        self.state = State(
            _Loss(module, loss_of),
            config.optimizer,
            config.learning_rate,
            config.weight_decay,
            config.precision,
            self.parallel,
        )
        self.writes = self.parallel.is_main
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        self.log = Log(folder / "log.jsonl", write=self.writes)
        self.looked_at: int | None = None
        self.last_save, self.save_due = time.perf_counter(), False
        self.busy, self.logged = 0.0, (0, 0.0)
        self.failed_together = False

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def run(self) -> Progress:
        if saved := self.checkpoints.load(self.state):
            self.state.load(saved)
            self.logged = self.progress.step, self.progress.seconds
            self.report(f"{self.folder.name}: goes on at step {self.progress.step}")
        self.log.trim(self.progress.step if saved else -1)
        saved = None  # its tensors have been copied
        self.module.train()
        if self.progress.step == 0:
            self.look()
        ended = ""
        try:
            with Stop() as stop:
                ended = self.train(stop)
                self.parallel.wait()
        except ExplodedError:
            ended = "exploded"
            raise
        except ControlNetError:  # such as a picture that cannot be read, halfway: what was trained is kept
            together = self.failed_together or self.parallel.count == 1
            if self.progress.step and together and self.state.is_finite:
                self.save()
            raise
        finally:
            if ended:
                self.log.write({"step": self.progress.step, "ended": ended})
        if stop.agreed:
            self.report(f"stopped at step {self.progress.step}, saved")
        self.state.keep_average()
        self.parallel.gather(self.state.module)
        return self.progress

    def train(self, stop: Stop) -> str:
        """Run all steps; returns how they ended."""
        last_tick = time.perf_counter()
        while self.done() < 1 and not stop.asked(self.parallel):
            rate = self.step()
            now = time.perf_counter()
            self.progress.seconds, last_tick = self.progress.seconds + now - last_tick, now
            if self.progress.step % self.config.log_every == 0:
                self.write_losses(rate)
            better = self.progress.step % self.config.validate_every == 0 and self.look()
            due = better or now - self.last_save > self.config.save_every
            self.save_due = self.save_due or self.parallel.agree(due)
            self.on_step(self.progress)
        is_saved = self.progress.step in self.parallel.once(self.checkpoints.steps)
        if self.done() >= 1 and self.looked_at != self.progress.step and not is_saved:
            self.look()
        if not self.state.is_finite:
            raise ExplodedError(f"weights are not finite at step {self.progress.step}")
        if not is_saved:
            self.save()
        return "stopped" if self.done() < 1 else "finished"

    def step(self) -> float:
        """One optimiser step; returns its learning rate."""
        config, state, progress = self.config, self.state, self.progress
        rate = self.rate()
        numbers = range(progress.step * config.accumulation, (progress.step + 1) * config.accumulation)
        # The mean loss of the step's batches, and its gradient over all processes.
        loss = torch.zeros((), device=state.device)
        for k in numbers:
            self.fetch_together(k)
            with self.parallel.accumulating(state.module, last=k == numbers[-1]):
                began = time.perf_counter()
                part = state.module(k) / config.accumulation
                self.busy += time.perf_counter() - began
                state.backward(part)
            loss += part.detach()
        norm = state.clip(config.clip_norm)
        value = self.parallel.mean(loss)
        # Weights are saved only once their loss is known to be good.
        if math.isnan(progress.first_loss):
            progress.first_loss = value
        _judge(progress, value)
        if not (state.scaler.is_enabled() or math.isfinite(norm)):
            raise ExplodedError(f"the gradient is {norm} at step {progress.step}")
        if self.save_due:
            self.save()
            self.last_save, self.save_due = time.perf_counter(), False
        state.update(rate, config.ema_decay)
        progress.recent = [*progress.recent, value][-RECENT:]
        progress.window.append(value)
        return rate

    def fetch_together(self, k: int) -> None:
        """Get what batch k needs. Raises the error of this process, or OtherFailedError for that of another one, in all
        of them before any waits for the others' gradients."""
        failed: ControlNetError | None = None
        try:
            self.fetch(k)
        except ControlNetError as error:
            failed = error
        if self.parallel.any(failed is not None):
            self.failed_together = True
            raise failed or OtherFailedError("")

    def rate(self) -> float:
        """The learning rate: it rises over the warm-up and falls over the last part of the run."""
        share = min(1.0, (self.progress.step + 1) / max(1, self.config.warmup_steps))
        if self.config.decay_fraction:
            share *= min(1.0, (1 - self.done()) / self.config.decay_fraction)
        return self.config.learning_rate * share

    def done(self) -> float:
        """The fraction of the run that is done; 1 is all of it."""
        spent = self.progress.seconds / 60 / self.config.minutes if self.config.minutes else 1.0
        return max(self.progress.step / self.config.max_steps, spent)

    def look(self) -> bool:
        """Validate the averaged weights; returns whether they are the best so far."""
        if self.validate is None:
            return False
        validate, progress = self.validate, self.progress
        self.looked_at = progress.step
        with self.state.averaged():
            self.module.eval()
            fields = self.parallel.once(lambda: validate(progress))
            self.log.write({"step": progress.step, **fields})
            if progress.step == 0:
                progress.first_loss = fields.get("validation_loss", math.nan)
            _judge(progress, fields.get("validation_loss"), "validation loss")
            better = fields.get("validation_loss", math.inf) < progress.best_loss
            if better:
                progress.best_loss, progress.best_step = fields["validation_loss"], progress.step
            if self.writes:
                self.on_validated(progress)
            self.module.train()
        return better

    def save(self) -> None:
        self.checkpoints.save(self.state, self.progress.step, self.progress.best_step)

    def write_losses(self, rate: float) -> None:
        progress = self.progress
        progress.loss = sum(progress.window) / len(progress.window)
        progress.window.clear()
        (step, since), self.logged = self.logged, (progress.step, progress.seconds)
        fields: dict[str, Any] = {
            "step": progress.step,
            "seconds": round(progress.seconds, 1),
            "loss": progress.loss,
            "lr": rate,
        }
        # How quick they are together; what each spends on its own batches and forward passes shows who is slow.
        if self.pairs and progress.seconds > since:
            fields["pairs_per_second"] = round((progress.step - step) * self.pairs / (progress.seconds - since), 3)
        if self.parallel.count > 1:
            fields["forward_seconds"] = self.parallel.all_of(round(self.busy / (progress.step - step), 4))
        self.busy = 0.0
        self.log.write(fields)


def _judge(progress: Progress, loss: float | None, what: str = "loss") -> None:
    """Raises ExplodedError when a loss, or the mean of the recent ones, is too high for a network that learns."""
    if loss is None:
        return
    recent = sum(progress.recent) / len(progress.recent) if len(progress.recent) >= RECENT // 5 else 0.0
    first = progress.first_loss
    if not math.isfinite(loss) or loss > EXPLODED_AT_ONCE * first or recent > EXPLODED * first:
        raise ExplodedError(f"the {what} is {max(loss, recent):.3g} at step {progress.step}, it began at {first:.3g}")
