"""`controlnet train DATA`, without the command line: data, cache, network, loop, and the folder that holds it all.

RUN/config.json, diffusion_pytorch_model.safetensors   the best network so far, in diffusers' layout
RUN/run.json, config.toml, log.jsonl                   what is trained and how it goes
RUN/curve.png, samples.png, README.md                  to look at
RUN/checkpoints/, pictures/                            to go on from; each look at the held-out pairs
"""

from __future__ import annotations

import errno
import gc
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from controlnet.model.base import Base
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.hint import SD_WIDTHS
from controlnet.model.control.lite import ControlNetLite, gaussian_convolutions_
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.strength import Strength
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import load_base, reload
from controlnet.model.nets import load_controlnet, save_controlnet
from controlnet.model.registry import BASES, TINY_HINT_WIDTHS
from controlnet.model.sampling.canvas import condition_tensor
from controlnet.model.sampling.generate import to_pixels
from controlnet.model.sampling.loop import Applied, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.model.training.cache import Cache
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.config import CHOICES, TrainConfig, to_toml
from controlnet.model.training.data import check_resumed, fingerprint, look_at, split
from controlnet.model.training.loop import ExplodedError, Progress, fit
from controlnet.model.training.objective import Batch, Diffusion, control_gap, control_losses
from controlnet.model.training.precision import PRECISIONS, attention, autocast
from controlnet.model.training.report import describe, draw_curve, model_card, read_run
from controlnet.model.training.samples import VALIDATION_TIMES, Samples, check_command
from controlnet.preprocessors.data.pairs import Pairs
from controlnet.preprocessors.errors import ModelError, OutputError, TrainingError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_bytes, read_image
from controlnet.preprocessors.sheet import contact_sheet
from controlnet.preprocessors.weights import cache_folder
from torch import Tensor

SHOWN = 3
"""Held-out pairs in samples.png."""


@dataclass
class Watcher:
    """Where a run tells what it does: text, progress of the preparation, progress of the training."""

    say: Callable[[str], None] = lambda text: None
    on_item: Callable[[str, int, int], None] = lambda what, of, done: None
    on_step: Callable[[Progress], None] = lambda progress: None


def train(
    found: Pairs, config: TrainConfig, folder: Path, device: torch.device, resume: bool = False, force: bool = False,
    offline: bool = False, watcher: Watcher | None = None, strict: bool = False,
) -> Progress:  # fmt: skip
    """Train a ControlNet on pairs; `config.kind` is set. Everything that can be wrong is looked at before step 1.

    Raises InputError for data that cannot be trained on, UsageError for settings or a resume that do not fit,
    ModelError for a base or network, OutputError when the disk is full, TrainingError for exploded losses and spent
    memory.
    """
    watcher = watcher or Watcher()
    processes = PartialState(cpu=device.type == "cpu")
    count = processes.num_processes
    if config.batch_size % count:
        raise UsageError(
            f"batch_size={config.batch_size} over {count} processes: expected a multiple",
            f"--set batch_size={count * max(1, config.batch_size // count)}",
        )
    if config.minutes != float("inf") and count > 1:
        raise UsageError("minutes ends a run of one process only", "--set max_steps=2000")
    if config.tensorboard:
        _tensorboard()
    torch.manual_seed(config.seed)
    with explained(config, folder):
        base = load_base(config.base, device, torch.float32, offline)
        net, config = make_controlnet(base, config)
        base_hash = model_hash(base.path)
        training, held_out = split(found, config)
        store = Cache(cache_folder() / "training" if config.cache else None)
        samples, validation = (Samples(list(p), config, base, base_hash, store) for p in (training, held_out))
        samples.check = validation.check = check_command(found.folder, config.kind)
        facts = look_at((samples, validation), strict, lambda text: watcher.say(f"warning: {text}"), samples.check)
        record = {
            "settings": asdict(config), "base_sha256": base_hash, "size": samples.size, "facts": facts,
            "data": {"name": str(found.folder), "form": found.form, "pairs": len(found.pairs),
                     "held_out": len(held_out), "sha256": fingerprint(found, Cache(cache_folder() / "training"))},
        }  # fmt: skip
        if resume:
            check_resumed(folder, record, force)
            reached = max(Checkpoints(folder / "checkpoints").steps(), default=0)
            if reached > config.max_steps:
                raise UsageError(f"max_steps={config.max_steps}: the run is at step {reached} already",
                                 f"--set max_steps={2 * reached} to go on")  # fmt: skip
            if not reached:
                watcher.say("no checkpoint yet: begins at step 0")
        if processes.is_main_process:
            begin(folder, record, config)
        with forgotten(folder, not resume and processes.is_main_process):
            prepare(samples, validation, processes, watcher)
        if config.cache:
            base.unload()
            gc.collect()
        base.unet.to(dtype=PRECISIONS[config.precision])
        if config.gradient_checkpointing:
            net.gradient_checkpointing = True
            base.unet.enable_gradient_checkpointing()
        work = _Training(net, base, samples, validation, config, folder, device, processes, watcher)
        with work.pool, attention(device, config.precision, samples.size <= 256):
            return fit(net, work.loss_of, config, folder, watcher.say, work.validate, work.show, watcher.on_step)


@contextmanager
def explained(config: TrainConfig, folder: Path) -> Iterator[None]:
    """What can go wrong on the way, as errors that say what to do."""
    try:
        yield
    except ExplodedError as error:
        kept = f"; the checkpoints before are kept in {folder}" if any(folder.glob("checkpoints/*.pt")) else ""
        known = BASES.get(config.base)
        usual = known.training.get("learning_rate", TrainConfig.learning_rate) if known else TrainConfig.learning_rate
        lower = min(config.learning_rate / 3, max(usual, config.learning_rate / 100))
        raise TrainingError(
            f"{error}{kept}", f"a lower rate from the start: --set learning_rate={lower:.1g}; {usual:g} is usual"
        ) from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        ways = ["--set gradient_checkpointing=true", "--set precision=bfloat16", "--set size=... (smaller pictures)"]
        if config.batch_size > 1:
            halved = f"--set batch_size={config.batch_size // 2} --set accumulation={2 * config.accumulation}"
            ways.insert(0, f"{halved} halves what grows with the batch and leaves the step as it is")
        raise TrainingError(
            f"out of memory with batch_size={config.batch_size} in {config.precision}", "; or ".join(ways)
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        whole = "; the last checkpoint is whole" if any(folder.glob("checkpoints/*.pt")) else ""
        raise OutputError(f"{error.filename or folder}: cannot be written ({error.strerror}){whole}",
                          "free some disk, then the same command with --resume") from error  # fmt: skip


def out_of_memory(error: RuntimeError) -> bool:
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "allocate memory" in str(error)
        or "not enough memory" in str(error)
    )


def begin(folder: Path, record: dict[str, Any], config: TrainConfig) -> None:
    write_file(folder / "config.toml", to_toml(config).encode())
    write_file(folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())


@contextmanager
def forgotten(folder: Path, new: bool) -> Iterator[None]:
    """A `new` run that fails inside leaves no trace: the same command may be given again."""
    try:
        yield
    except BaseException:
        if new:
            for name in ("run.json", "config.toml"):
                (folder / name).unlink(missing_ok=True)
        raise


def prepare(samples: Samples, validation: Samples, processes: PartialState, watcher: Watcher) -> None:
    """Fill the cache; each process makes its part."""
    if samples.cache.folder is not None:
        watcher.say(f"preparing {len(samples.pairs) + len(validation.pairs):,} pairs; what is in the cache is quick")
        for what, one in (("pairs", samples), ("held-out pairs", validation)):
            rows = range(processes.process_index, len(one.pairs), processes.num_processes)
            one.prepare(rows, partial(watcher.on_item, what, len(rows)))
    processes.wait_for_everyone()


def make_controlnet(base: Base, config: TrainConfig) -> tuple[ControlNet, TrainConfig]:
    """A fresh network of the form that the settings name, or the one to go on from; and the settings, with that one's
    form. Raises UsageError for settings that contradict it, ModelError for a base that cannot be trained on."""
    if config.start_from != "base":
        net = load_controlnet(Path(config.start_from), torch.float32, base.unet.config, base.name).to(base.device)
        form = {"hint": net.hint, "copy": net.config.get("copy", "full"), "convolutions": "zero"}
        for name, value in form.items():
            if getattr(config, name) not in (value, CHOICES[name][0]):
                raise UsageError(
                    f"{name}={getattr(config, name)}, but {config.start_from} is {value}", f"--set {name}={value}"
                )
        config = replace(config, **form)
    else:
        widths = SD_WIDTHS if base.unet.config.block_out_channels[0] >= 128 else TINY_HINT_WIDTHS
        if config.hint == "paper":
            widths = (16, 32, 64, 128)
        network = ControlNetLite if config.copy == "lite" else ControlNet
        try:
            net = network.from_base(base.unet, config.hint, widths)
        except ValueError as error:
            raise ModelError(
                f"base {base.name}: {error}", "--base sd15, or another of Stable Diffusion 1.x's form"
            ) from error
        if config.convolutions == "gaussian":
            gaussian_convolutions_(net)
    net = net.to(base.device, torch.float32).requires_grad_(True).to(memory_format=torch.channels_last)
    return net, config


class _Training:
    """The functions that the loop calls."""

    def __init__(self, net: ControlNet, base: Base, samples: Samples, validation: Samples, config: TrainConfig,
                 folder: Path, device: torch.device, processes: PartialState, watcher: Watcher):  # fmt: skip
        self.net, self.base, self.samples, self.validation = net, base, samples, validation
        self.config, self.folder, self.device, self.processes, self.watcher = config, folder, device, processes, watcher
        self.diffusion = Diffusion(base.scheduler, device)
        base.unet.to(memory_format=torch.channels_last)
        self.pool = ThreadPoolExecutor(1)
        self.next: tuple[int, Any] = (-1, None)
        self.held_out: list[tuple[Batch, Tensor]] = []
        writes = config.tensorboard and processes.is_main_process
        self.board = _tensorboard()(str(folder / "tensorboard")) if writes else None

    def _batch(self, k: int) -> Batch:
        """Batch k; the next one is read while it is computed."""
        part = self.processes.process_index, self.processes.num_processes
        future = self.next[1] if self.next[0] == k else self.pool.submit(self.samples.batch, k, *part)
        batch = future.result()
        self.next = k + 1, self.pool.submit(self.samples.batch, k + 1, *part)
        return batch

    def losses_of(self, batch: Batch) -> Tensor:
        batch = batch.map(lambda x: x.to(self.device))
        batch.condition = batch.condition.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.config.precision):
            return control_losses(self.base.unet, self.net, self.diffusion, batch, self.config.min_snr or None)

    def loss_of(self, k: int) -> Tensor:
        return self.losses_of(self._batch(k)).mean()

    def validate(self, progress: Progress) -> dict[str, Any]:
        """The control gap; pictures at the chosen steps."""
        self.held_out = self.held_out or self.validation.validation()
        fields: dict[str, Any] = control_gap(self.losses_of, self.held_out, VALIDATION_TIMES)
        every = (
            max(1, self.config.max_steps // max(1, self.config.pictures) // self.config.validate_every)
            * self.config.validate_every
        )
        if self.config.pictures and (progress.step % every == 0 or progress.step >= self.config.max_steps):
            fields["pictures"] = self.pictures(progress.step)
        return fields

    @torch.no_grad()
    def pictures(self, step: int) -> str:
        """What the network makes of the first held-out conditions: one PNG, side by side."""
        count = min(SHOWN, len(self.validation.pairs))
        base, side = self.base, self.validation.size
        dtype = base.dtype
        held_out = self.validation
        maps = [condition_tensor(held_out.condition(i, 0, False)) for i in range(count)]
        conditions = torch.stack(maps).to(self.device)
        captions = [held_out.pairs[i].caption for i in range(count)]
        prompt, negative = (
            Prompt(torch.from_numpy(np.stack([held_out.text(text) for text in texts]))).to(self.device, dtype)
            for texts in (captions, [""])
        )
        if base.vae is None:
            reload(base, "vae")
        with autocast(self.device, self.config.precision):
            start = FromNoise.seeded(list(range(count)), (base.unet.config.in_channels, side // 8, side // 8))
            applied = [Applied(self.net, self.net.prepare(conditions), Strength(control_on=base.control_on))]
            latents = sample(
                base.unet, make_scheduler(base.scheduler), start, prompt, negative, applied, 20, base.guidance
            )
        images = to_pixels(base.decode(latents.float()))
        if self.config.cache:
            base.vae = None
        name = f"pictures/step-{step:07d}.png"
        write_file(self.folder / name, png_bytes(np.concatenate(list(images), 1)))
        return name

    def show(self, progress: Progress) -> None:
        """Say where the run stands, draw curve.png and samples.png; keep the network if it is the best so far."""
        run = read_run(self.folder)
        if progress.best_step == progress.step:
            save_controlnet(self.net, self.folder)
            write_file(self.folder / "README.md", model_card(run, progress.step).encode())
        draw_curve(run, self.folder / "curve.png")
        self.strip([row for row in run.validations if "pictures" in row])
        if self.board:
            for name in ("control_gap", "band", "validation_loss"):
                self.board.add_scalar(name, run.validations[-1][name], progress.step)
            self.board.flush()
        self.watcher.say(", ".join(describe(run)[:3]))

    def strip(self, rows: list[dict]) -> None:
        if not rows:
            return
        shots = {}
        for row in rows:
            path = self.folder / row["pictures"]
            if path.is_file():
                shots[row["step"]] = read_image(read_bytes(str(path)), path.name)[0]
        cells: list[tuple[np.ndarray, str]] = []
        side = self.validation.size
        for i in range(min(SHOWN, len(self.validation.pairs))):
            cells.append((self.validation.picture(i, 0), "held-out picture"))
            cells.append((self.validation.condition(i, 0, False), f"its {self.config.kind}"))
            cells += [(shot[:, i * side : (i + 1) * side], f"step {step}") for step, shot in sorted(shots.items())]
        write_file(self.folder / "samples.png", png_bytes(contact_sheet(cells, len(shots) + 2, 128)))


def _tensorboard() -> type:
    """Its writer. Raises UsageError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard=true: the package is not installed", "pip install tensorboard") from None
    return SummaryWriter
