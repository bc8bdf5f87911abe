"""`controlnet train DATA`, without the command line: data, cache, network, loop, and the folder that holds it all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from controlnet.model.base import Base
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import load_base
from controlnet.model.nets import save_controlnet
from controlnet.model.training.cache import Cache, key_of
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.config import TrainConfig, to_toml
from controlnet.model.training.data import check_resumed, fingerprint, look_at, order_of, split
from controlnet.model.training.explain import explained
from controlnet.model.training.loop import Progress, fit
from controlnet.model.training.network import make_controlnet
from controlnet.model.training.objective import Batch, NoiseSchedule, control_gap, control_losses
from controlnet.model.training.optimizers import adamw_of_8_bits
from controlnet.model.training.parallel import Parallel
from controlnet.model.training.pictures import draw, draw_strip
from controlnet.model.training.precision import PRECISIONS, attention_kernels, autocast
from controlnet.model.training.recorded import Recorded
from controlnet.model.training.report import describe, draw_curve, model_card, read_run
from controlnet.model.training.runfolder import RunFolder
from controlnet.model.training.samples import VALIDATION_TIMES, Samples, check_command
from controlnet.preprocessors.data.pair import Pairs, Source
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.weights import cache_folder
from torch import Tensor


@dataclass
class Watcher:
    """What a run reports while it works: text, progress of the preparation, progress of the training."""

    say: Callable[[str], None] = lambda text: None
    on_item: Callable[[str, int, int], None] = lambda what, of, done: None
    on_step: Callable[[Progress], None] = lambda progress: None


def train(
    found: Source,
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    resume: bool = False,
    force: bool = False,
    offline: bool = False,
    watcher: Watcher | None = None,
    strict: bool = False,
) -> Progress:
    """Train a ControlNet on pairs; `config.kind` must be set. Everything that can be checked is checked before step 1.

    Raises InputError for data that cannot be trained on, UsageError for settings or a resume that do not fit,
    ModelError for a base or ControlNet that cannot be used, OutputError when the disk is full, TrainingError when the
    loss explodes or memory runs out.
    """
    watcher = watcher or Watcher()
    processes = Parallel(device)
    _check_settings(config, processes)
    torch.manual_seed(config.seed)
    run = RunFolder(folder)
    with explained(config, run):
        # In low memory until the training begins: encoders and VAE are on the device only while they work.
        base = load_base(config.base, device, torch.float32, offline, low_memory=True)
        base.vae.disable_tiling()
        net, config = make_controlnet(base, config, offline)
        base_hash = model_hash(base.path)

        # The data, checked before anything is computed from it.
        training, held_out = split(found, config)
        store = Cache(cache_folder() / "training" if config.cache else None)
        order = order_of(found, config)
        samples = Samples(training, config, base, base_hash, store, order, config.buckets)
        validation = Samples(held_out, config, base, base_hash, store)
        samples.check_command = validation.check_command = check_command(found.folder, config.kind)
        facts = look_at(
            (samples, validation), strict, lambda text: watcher.say(f"warning: {text}"), samples.check_command
        )
        record = _record(found, config, base_hash, samples, validation, facts, store)
        if resume:
            _check_resume(run, record, config, force, watcher)
        new = not resume and processes.is_main
        if processes.is_main:
            run.begin(record, to_toml(config))
        with run.forgotten(new):
            prepare(samples, validation, processes, watcher, None if order else record["data"]["sha256"])

        # The network, with only those parts of the base that it still needs.
        if config.cache and order is None:
            base.unload()
            gc.collect()
        _make_ready(net, base, config)
        work = _Training(net, base, samples, validation, config, run, device, processes, watcher)
        with work.pool, attention_kernels(device, config.precision, samples.size <= 256):
            pairs = config.batch_size * config.accumulation
            report = watcher.say, work.validate, work.show, watcher.on_step, pairs, work.fetch
            return fit(net, work.loss_of, config, folder, *report)


def _make_ready(net: ControlNet, base: Base, config: TrainConfig) -> None:
    """The networks on the device, in the arithmetic of the settings."""
    base.keep_on_device()
    base.unet.to(dtype=PRECISIONS[config.precision])
    if config.gradient_checkpointing:
        net.gradient_checkpointing = True
        base.unet.enable_gradient_checkpointing()


def _check_settings(config: TrainConfig, processes: Parallel) -> None:
    """Raises UsageError for settings that do not fit this machine or the processes."""
    count = processes.count
    if config.batch_size % count:
        raise UsageError(
            f"batch_size={config.batch_size} over {count} processes: expected a multiple",
            f"--set batch_size={count * max(1, config.batch_size // count)}",
        )
    if config.minutes != float("inf") and count > 1:
        raise UsageError("minutes ends a run of one process only", "--set max_steps=2000")
    processes.check(config.optimizer, config.precision)
    if config.optimizer == "adamw8bit":
        adamw_of_8_bits()
    if config.tensorboard:
        _tensorboard()


def _record(
    found: Source,
    config: TrainConfig,
    base_hash: str,
    samples: Samples,
    validation: Samples,
    facts: dict[str, float],
    store: Cache,
) -> dict[str, Any]:
    """run.json: what is trained on what."""
    data = {
        "name": str(found.folder),
        "form": found.form,
        "pairs": len(found.pairs) if isinstance(found, Pairs) else None,
        "held_out": len(validation.pairs),
        "sha256": fingerprint(found, store),
    }
    return {"settings": asdict(config), "base_sha256": base_hash, "size": samples.size, "facts": facts, "data": data}


def _check_resume(run: RunFolder, record: dict[str, Any], config: TrainConfig, force: bool, watcher: Watcher) -> None:
    """Raises UsageError for a run that cannot go on with these settings and data."""
    check_resumed(run.path, record, force)
    reached = max(Checkpoints(run.checkpoints).steps(), default=0)
    if reached > config.max_steps:
        raise UsageError(
            f"max_steps={config.max_steps}: the run is at step {reached} already",
            f"--set max_steps={2 * reached} to go on",
        )
    if not reached:
        watcher.say("no checkpoint yet: begins at step 0")


def prepare(
    samples: Samples, validation: Samples, processes: Parallel, watcher: Watcher, data: dict[str, str] | None
) -> None:
    """Fill the cache; each process makes its part. `data` is the fingerprint of the pairs, by which it is known that
    they have been prepared before; of a stream (None) only the held-out pairs are known beforehand."""
    cache, done = samples.cache, key_of("prepared", data, samples.identity, len(validation.pairs))
    if cache.folder is not None and not (data and cache.has_note(done)):
        sets = {"held-out pairs": validation} if data is None else {"pairs": samples, "held-out pairs": validation}
        count = sum(len(one.pairs) for one in sets.values())
        watcher.say(f"preparing {count:,} pairs; what is in the cache is quick")
        for what, one in sets.items():
            rows = range(processes.index, len(one.pairs), processes.count)
            one.prepare(rows, partial(watcher.on_item, what, len(rows)))
        processes.wait()
        if data and processes.is_main:
            cache.note(done)
    processes.wait()


def can_be_recorded(config: TrainConfig, processes: Parallel) -> bool:
    """Whether each step is one pass over samples of one size, whose gradients nothing else touches (recorded.py)."""
    one_pass = config.accumulation == 1 and not config.buckets
    return processes.is_alone and one_pass and not config.gradient_checkpointing


class _Training:
    """The functions that the loop calls."""

    def __init__(
        self,
        net: ControlNet,
        base: Base,
        samples: Samples,
        validation: Samples,
        config: TrainConfig,
        run: RunFolder,
        device: torch.device,
        processes: Parallel,
        watcher: Watcher,
    ):
        self.net, self.base, self.samples, self.validation = net, base, samples, validation
        self.config, self.run, self.device, self.processes, self.watcher = config, run, device, processes, watcher
        self.schedule = NoiseSchedule(base.scheduler, device)
        base.unet.to(memory_format=torch.channels_last)
        self.losses: Callable[..., Tensor] = self._losses
        if can_be_recorded(config, processes):
            self.losses = Recorded(net, self._losses, lambda: wait([self.next[1]]), watcher.say)
        self.pool = ThreadPoolExecutor(1)
        self.next: tuple[int, Any] = (-1, None)
        self.batch: tuple[int, list[Batch]] = -1, []
        self.held_out: list[tuple[Batch, Tensor]] = []
        writes = config.tensorboard and processes.is_main
        self.board = _tensorboard()(str(run.tensorboard)) if writes else None

    def _batch(self, k: int) -> list[Batch]:
        """Batch k, a part for each size of canvas; the next one is prepared in the background."""
        part = self.processes.index, self.processes.count
        future = self.next[1] if self.next[0] == k else self.pool.submit(self.samples.batch, k, *part)
        batch = future.result()
        self.next = k + 1, self.pool.submit(self.samples.batch, k + 1, *part)
        return batch

    def fetch(self, k: int) -> None:
        """Get batch k, so that what is wrong with its files is known before anything is computed. Raises as `Samples`
        does."""
        self.batch = k, self._batch(k)

    def losses_of(self, batch: Batch) -> Tensor:
        batch = batch.map(lambda x: x.to(self.device))
        batch.condition = batch.condition.contiguous(memory_format=torch.channels_last)
        return self.losses(*batch.tensors)

    def _losses(self, *tensors: Any) -> Tensor:
        with autocast(self.device, self.config.precision):
            batch = Batch.of(*tensors)
            return control_losses(self.base.unet, self.net, self.schedule, batch, self.config.min_snr or None)

    def loss_of(self, k: int) -> Tensor:
        return torch.cat([self.losses_of(part) for part in self.batch[1]]).mean()

    def validate(self, progress: Progress) -> dict[str, Any]:
        """Fields for the log: the control gap, and pictures at the chosen steps."""
        self.held_out = self.held_out or self.validation.validation()
        fields: dict[str, Any] = control_gap(self.losses_of, self.held_out, VALIDATION_TIMES)
        every = (
            max(1, self.config.max_steps // max(1, self.config.pictures) // self.config.validate_every)
            * self.config.validate_every
        )
        if self.config.pictures and (progress.step % every == 0 or progress.step >= self.config.max_steps):
            path, unloaded = self.run.pictures(progress.step), self.base.vae is None
            write_file(path, png_bytes(draw(self.base, self.net, self.validation, self.device, self.config.precision)))
            if unloaded:  # it was read again for the picture
                self.base.vae = None
            fields["pictures"] = str(path.relative_to(self.run.path))
        return fields

    def show(self, progress: Progress) -> None:
        """Say where the run stands, draw curve.png and samples.png; keep the network if it is the best so far."""
        state = read_run(self.run.path)
        if progress.best_step == progress.step:
            save_controlnet(self.net, self.run.path)
            write_file(self.run.card, model_card(state, progress.step).encode())
        draw_curve(state, self.run.curve)
        draw_strip(self.run, state.validations, self.validation, self.config.kind)
        if self.board:
            for name in ("control_gap", "band", "validation_loss"):
                self.board.add_scalar(name, state.validations[-1][name], progress.step)
            self.board.flush()
        self.watcher.say(", ".join(describe(state)[:3]))


def _tensorboard() -> type:
    """TensorBoard's writer class. Raises UsageError if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard=true: the package is not installed", "pip install tensorboard") from None
    return SummaryWriter
