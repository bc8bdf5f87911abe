"""The training loop that every network of this project is trained with: optimiser, accumulation, EMA, checkpoints,
exact resume, several processes.

Knows neither what is trained nor on what data: it is given a module and a function from the number of a batch to a
loss. That function draws all its randomness from the number, so a resumed run repeats an uninterrupted one, and there
is no other random state to save.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.optimizers import OPTIMIZERS, make_optimizer
from controlnet.model.training.precision import PRECISIONS
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.files import beside
from controlnet.preprocessors.lock import ORPHANED
from torch import Tensor, nn

EXPLODED = 4.0
"""A mean loss this many times the first one has exploded; a single one may be so for its noise and timestep alone."""
EXPLODED_AT_ONCE = 25.0
"""No noise does this to a single one."""
RECENT = 50
"""Steps over which the loss is averaged for that; a fifth of them must be there."""


@dataclass(frozen=True)
class LoopConfig:
    """How a loop optimises and when it stops: at `max_steps` or after `minutes`, whichever comes first."""

    max_steps: int = 1_000_000
    """Optimiser steps; accumulated batches do not count."""
    minutes: float = float("inf")
    """Training time of all runs into the same folder together; 0 takes what is there."""
    accumulation: int = 1
    """Batches whose gradients are averaged in one optimiser step."""
    optimizer: str = "adamw"
    """adamw, or muon for matrices and adamw for the rest."""
    learning_rate: float = 1e-4
    """After the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    decay_fraction: float = 0.25
    """The last part of the run, over which the learning rate falls linearly to zero."""
    weight_decay: float = 1e-2
    """Share of the weights that a step takes off, times the learning rate."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are what a run gives; rises to this from 0.1 over the first thousands of steps."""
    precision: str = "bfloat16"
    """float32, bfloat16 or float16; master weights and optimiser are float32 in any case."""
    save_every: float = 120.0
    """Seconds between checkpoints."""
    keep: int = 1
    """How many of the last checkpoints stay; the best one stays besides."""
    log_every: int = 50
    """Steps between lines of the log."""
    validate_every: int = 100
    """Steps between looks at the held-out data."""

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


@dataclass
class Progress:
    """Where a loop stands."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """Mean over the steps of the last log line."""
    first_loss: float = math.nan
    """Of the validation before step 1, else of step 1; an explosion is measured by it."""
    best_loss: float = math.inf
    """Of the validations; the network of `best_step` had it."""
    best_step: int | None = None
    window: list[float] = field(default_factory=list)
    """Losses since the last log line."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last RECENT steps."""


class ExplodedError(ArithmeticError):
    """The loss is not finite, or far above where it began. Every checkpoint is of a step whose loss was still good."""


def fit(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: LoopConfig,
    folder: Path,
    report: Callable[[str], None] = print,
    validate: Callable[[Progress], dict[str, Any]] | None = None,
    on_validated: Callable[[Progress], None] = lambda progress: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train `module` in place and leave its exponential moving average in it.

    loss_of(k) gives the scalar loss of batch k; one optimiser step takes `accumulation` of them. Goes on from the last
    checkpoint in `folder/checkpoints`. `validate` runs on the averaged weights before the first step, every
    `validate_every` steps and at the end, and returns fields for the log; the lowest `validation_loss` among them makes
    the step the best one; `on_validated` follows when they are written. A checkpoint is written when the loss at its
    weights has been seen, not before. The log's last line says how the loop ended: finished, stopped (SIGTERM, SIGINT;
    after a checkpoint) or exploded. With several processes (Accelerate's environment), each computes its own part of
    batch k, gradients are averaged, and the first one writes.

    Raises ExplodedError when the loss stops being finite or explodes, OSError when a checkpoint cannot be written; the
    earlier ones stay in both cases.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    processes = PartialState(cpu=device.type == "cpu")
    checkpoints = Checkpoints(folder / "checkpoints", config.keep)
    log = Log(folder / "log.jsonl", write=processes.is_main_process)
    optimizer = make_optimizer(module, config.optimizer, config.learning_rate, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    ema = [p.detach().clone() for p in parameters]
    progress = Progress()
    if state := checkpoints.load(device):
        torch._foreach_copy_([p.data for p in parameters], state["parameters"])
        torch._foreach_copy_(ema, state["ema"])
        if state.get("optimizer_is", "adamw") == config.optimizer:  # else another one's moments are of no use
            optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
        scaler.load_state_dict(state["scaler"])
        progress = Progress(**state["progress"])
        report(f"{folder.name}: goes on at step {progress.step}")
    log.trim(progress.step if state else -1)
    state = None  # its tensors have been copied
    looked_at: int | None = None

    def save() -> None:
        if processes.is_main_process:
            state = {"parameters": [p.detach() for p in parameters], "ema": ema, "optimizer": optimizer.state_dict(),
                     "optimizer_is": config.optimizer, "scaler": scaler.state_dict(),
                     "progress": asdict(progress)}  # fmt: skip
            checkpoints.save(state, progress.step, progress.best_step)

    def check() -> bool:
        """Look at the averaged weights; whether they are the best so far."""
        nonlocal looked_at
        if validate is None or not processes.is_main_process:
            return False
        looked_at = progress.step
        with averaged(parameters, ema):
            module.eval()
            fields = validate(progress)
            log.write({"step": progress.step, **fields})
            if progress.step == 0:
                progress.first_loss = fields.get("validation_loss", math.nan)
            _judge(progress, fields.get("validation_loss"), "validation loss")
            better = fields.get("validation_loss", math.inf) < progress.best_loss
            if better:
                progress.best_loss, progress.best_step = fields["validation_loss"], progress.step
            on_validated(progress)
            module.train()
        return better

    def done() -> float:
        spent = progress.seconds / 60 / config.minutes if config.minutes else 1.0
        return max(progress.step / config.max_steps, spent)

    def train(stop: Stop) -> str:
        """The steps; how they ended."""
        last_save, save_due = time.perf_counter(), False
        last_tick = last_save
        while done() < 1 and not stop.asked(processes):
            rate = min(1.0, (progress.step + 1) / max(1, config.warmup_steps))
            if config.decay_fraction:
                rate *= min(1.0, (1 - done()) / config.decay_fraction)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            loss = torch.zeros((), device=device)
            for k in range(progress.step * config.accumulation, (progress.step + 1) * config.accumulation):
                part = loss_of(k) / config.accumulation
                scaler.scale(part).backward()
                loss += part.detach()
            average_gradients(parameters, processes)  # before the scaler looks for infinities: all must see the same
            scaler.unscale_(optimizer)
            norm = float(nn.utils.clip_grad_norm_(parameters, config.clip_norm))
            value = float(reduce(loss, "mean")) if processes.num_processes > 1 else float(loss)
            if math.isnan(progress.first_loss):
                progress.first_loss = value
            _judge(progress, value)
            if not (scaler.is_enabled() or math.isfinite(norm)):
                raise ExplodedError(f"the gradient is {norm} at step {progress.step}")
            if save_due:
                save()
                last_save, save_due = time.perf_counter(), False
            progress.recent = [*progress.recent, value][-RECENT:]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            decay = min(config.ema_decay, (1 + progress.step) / (10 + progress.step))
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
            progress.window.append(value)
            now = time.perf_counter()
            progress.seconds, last_tick = progress.seconds + now - last_tick, now
            if progress.step % config.log_every == 0:
                _log(log, progress, rate * config.learning_rate)
            better = progress.step % config.validate_every == 0 and check()
            save_due = save_due or better or now - last_save > config.save_every
            on_step(progress)
        if done() >= 1 and looked_at != progress.step and not checkpoints.path(progress.step).exists():
            check()
        if not all(bool(p.isfinite().all()) for p in parameters):
            raise ExplodedError(f"weights are not finite at step {progress.step}")
        if not checkpoints.path(progress.step).exists():
            save()
        return "stopped" if done() < 1 else "finished"

    module.train()
    if progress.step == 0:
        check()
    ended = ""
    try:
        with Stop() as stop:
            ended = train(stop)
            processes.wait_for_everyone()
    except ExplodedError:
        ended = "exploded"
        raise
    except ControlNetError:  # a picture that cannot be read, met in the middle: what was trained is kept
        if progress.step and all(bool(p.isfinite().all()) for p in parameters):
            save()
        raise
    finally:
        if ended:
            log.write({"step": progress.step, "ended": ended})
    if stop.agreed:
        report(f"stopped at step {progress.step}, saved")
    for parameter, average in zip(parameters, ema, strict=True):
        parameter.data.copy_(average)
    return progress


def _log(log: Log, progress: Progress, rate: float) -> None:
    progress.loss = sum(progress.window) / len(progress.window)
    progress.window.clear()
    log.write({"step": progress.step, "seconds": round(progress.seconds, 1), "loss": progress.loss, "lr": rate})


def _judge(progress: Progress, loss: float | None, what: str = "loss") -> None:
    """Raises ExplodedError when a loss, or the mean of the recent ones, cannot be one of a network that learns."""
    if loss is None:
        return
    recent = sum(progress.recent) / len(progress.recent) if len(progress.recent) >= RECENT // 5 else 0.0
    first = progress.first_loss
    if not math.isfinite(loss) or loss > EXPLODED_AT_ONCE * first or recent > EXPLODED * first:
        raise ExplodedError(f"the {what} is {max(loss, recent):.3g} at step {progress.step}, it began at {first:.3g}")


@contextmanager
def averaged(parameters: list[nn.Parameter], ema: list[Tensor]) -> Iterator[None]:
    """Inside, the parameters hold their moving average."""
    kept = [p.detach().clone() for p in parameters]
    try:
        torch._foreach_copy_([p.data for p in parameters], ema)
        yield
    finally:
        torch._foreach_copy_([p.data for p in parameters], kept)


def average_gradients(parameters: list[nn.Parameter], processes: PartialState) -> None:
    """Mean over the processes, in one message."""
    if processes.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    torch._foreach_copy_(
        gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    )


class Stop:
    """Whether a signal has asked to end; the processes of a run agree on it. A second SIGTERM or SIGINT does not wait
    for the checkpoint; ORPHANED always does, since it reaches the processes up to a second apart."""

    signal: int | None = None
    """The one that this process was sent."""
    agreed: bool = False
    """Some process of the run was sent one."""

    def __enter__(self) -> Stop:
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, ORPHANED)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, signal.SIG_IGN if self.agreed and number == ORPHANED else handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None and number != ORPHANED:  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def asked(self, processes: PartialState) -> bool:
        self.agreed = self.signal is not None
        if processes.num_processes > 1:
            flag = reduce(torch.tensor(float(self.agreed), device=processes.device), "sum")
            self.agreed = bool(flag > 0)
        return self.agreed


class Log:
    """JSON lines, one object a line."""

    def __init__(self, path: Path, write: bool = True):
        self.path, self.writes = path, write
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, fields: dict[str, Any]) -> None:
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(fields) + "\n")

    def trim(self, step: int) -> None:
        """Drop what was logged after `step`, and a last line that a crash cut off."""
        if self.writes and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(True) if _step_of(line) <= step]
            with beside(self.path) as temporary:
                temporary.write_text("".join(lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf
