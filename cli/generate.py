"""`controlnet generate --cond MAP --prompt TEXT`: condition maps and prompts become images.

Everything that can be wrong without a model is checked before one is loaded.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from controlnet.cli.conditions import ConditionFlag, parse_condition
from controlnet.cli.options import (
    Device,
    Dtype,
    Json,
    Offline,
    Out,
    Overwrite,
    Quiet,
    SkipExisting,
    Strict,
    keeps,
    output_path,
    say,
    tell,
    warn,
)
from controlnet.preprocessors.errors import InputError, ModelError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from controlnet.model.base import Base
    from controlnet.model.generate import Placed

HELP = "Make images from condition maps and a prompt."
MAX_NUM = 10_000
MAX_STEPS = 999  # schedulers with an offset of one step have no more

Cond = Annotated[
    list[str] | None,
    typer.Option(
        "--cond",
        metavar="PATH[,key=value...]",
        help="A condition map; repeat for several. Keys: detect=KIND, kind, net, scale, start, end.",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What the image shows.")]
Negative = Annotated[str, typer.Option(help="What it should not show.")]
Num = Annotated[int, typer.Option("--num", "-n", help="How many images; image k uses seed + k.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale; 1 is none. (default: the base's)")
]
SchedulerName = Annotated[str | None, typer.Option("--scheduler", help="ddim, euler, unipc, ... (default: the base's)")]
BaseName = Annotated[
    str,
    typer.Option(
        "--base",
        envvar="CONTROLNET_BASE",
        help="The text-to-image model: tiny, sd15, a folder in diffusers' layout, or a hub id.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Canvas, WIDTHxHEIGHT or one number. (default: the condition's aspect at the base's native size)"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image. (default: random, and told)")]


def generate(
    cond: Cond = None, prompt: Prompt = "", negative: Negative = "", out: Out = None, num: Num = 1, steps: Steps = 20,
    guidance: Guidance = None, scheduler: SchedulerName = None, base: BaseName = "tiny", size: Size = None,
    seed: Seed = None, device: Device = None, dtype: Dtype = None, as_json: Json = False, overwrite: Overwrite = False,
    skip_existing: SkipExisting = False, offline: Offline = False, strict: Strict = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    from controlnet.preprocessors.geometry import parse_size

    flags = [parse_condition(text) for text in cond or []]
    if not flags and not prompt:
        raise UsageError(
            "nothing to go by: neither --cond nor --prompt", 'controlnet generate --cond map.canny.png --prompt "..."'
        )
    if not 1 <= num <= MAX_NUM:
        raise UsageError(f"--num {num}: expected 1 to {MAX_NUM}", "--num 4")
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"--steps {steps}: expected 1 to {MAX_STEPS}", "--steps 20")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 1):
        raise UsageError(f"--guidance {guidance}: expected a number from 1 on", "--guidance 7.5")
    seed = random.randrange(2**31) if seed is None else seed
    if not 0 <= seed < 2**63 - num:
        raise UsageError(f"--seed {seed}: expected 0 to {2**63 - 1}", "--seed 42")
    canvas = parse_size(size) if size else None
    stem = _stem(flags[0].path) if flags else "image"
    targets = {s: output_path(out, Path("out") / f"{s}-{stem}.png", num > 1) for s in range(seed, seed + num)}
    kept = {s for s, path in targets.items() if path and keeps(path, overwrite, skip_existing)}
    for s in sorted(kept):
        tell({"output": str(targets[s]), "seed": s, "skipped": True}, as_json)
    maps = [_read(flag, offline) for flag in flags]
    if len(kept) < num:
        seeds = [s for s in targets if s not in kept]
        _generate(
            maps,
            prompt,
            negative,
            seeds,
            targets,
            steps,
            guidance,
            scheduler,
            base,
            canvas,
            device,
            dtype,
            as_json,
            offline,
            strict,
            quiet,
        )


def _stem(path: str) -> str:
    """Of an image's name: the condition's, without its kind, so that an image is not taken for a map later."""
    from controlnet.preprocessors.metadata import KINDS

    stem = Path(path).stem if path != "-" else "stdin"
    for kind in KINDS:
        stem = stem.removesuffix(f".{kind}").removesuffix(f"_{kind}")
    return stem or "image"


def _read(flag: ConditionFlag, offline: bool) -> tuple[ConditionFlag, str, np.ndarray, dict]:
    """A condition's kind, map (H, W, 3) uint8, and the record of where it came from; stage one where `detect` asks."""
    from controlnet.preprocessors.detect import detect, record, rgb
    from controlnet.preprocessors.geometry import STEP
    from controlnet.preprocessors.images import read_bytes, read_image
    from controlnet.preprocessors.metadata import load, sha256
    from controlnet.preprocessors.registry import find_detector

    data = read_bytes(flag.path)
    image, text = read_image(data, flag.path, warn)
    fields: dict[str, Any] = {"path": flag.path, "sha256": sha256(data)}
    if flag.detect is None:
        kind = _kind(flag, text)
        if kind == "pose" and (keypoints := load(text).get("keypoints")) is not None:
            fields["keypoints"] = keypoints
        return flag, kind, image, fields
    detector = find_detector(flag.detect)
    options = detector.load_options()()
    # The map keeps the photo's aspect, with the shorter side at 512 as `detect` has it.
    ratio = 512 / min(image.shape[:2])
    size = tuple(round(side * ratio / STEP) * STEP for side in (image.shape[1], image.shape[0]))
    map_, found = detect(image, detector.ready(options, offline=offline), size, "crop")
    fields |= {"detect": record(detector, options, size, "crop", flag.path, data)} | found
    return flag, flag.kind or flag.detect, rgb(map_), fields


def _kind(flag: ConditionFlag, text: dict[str, str]) -> str:
    """As given, or told by the map's text or name; with a net of one's own it may be any."""
    from controlnet.preprocessors.metadata import kind_of

    try:
        return kind_of(flag.path, text, flag.kind)
    except UsageError:
        if flag.net:
            return "own"
        raise


def _generate(maps, prompt, negative, seeds, targets, steps, guidance, scheduler, base_name, canvas, device, dtype,
              as_json, offline, strict, quiet) -> None:  # fmt: skip
    _silence_libraries()
    from controlnet.model.base import load_base
    from controlnet.model.generate import canvas_size, generate
    from controlnet.model.hashes import folder_hash
    from controlnet.model.schedulers import make_scheduler
    from controlnet.preprocessors.images import png_bytes, write_file

    device = _device(device)
    dtype = _dtype(dtype, device)
    base = load_base(base_name, device, dtype, offline)
    own = make_scheduler(base.scheduler, scheduler)
    size = canvas or canvas_size(base, (maps[0][2].shape[1], maps[0][2].shape[0]) if maps else None)
    placed, records = _place(maps, base, size, offline, strict)
    guidance = base.guidance if guidance is None else guidance
    for text in filter(None, (prompt, negative)):
        if cut := base.cut_words(text):
            warn(f"the text encoder reads {base.max_tokens - 2} tokens; these words are beyond: {cut}")
        if unknown := base.unknown_words(text):
            warn(f"{base_name} never met these words in training: {', '.join(unknown)}")
    name = str(dtype).removeprefix("torch.")
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    say(f"base {base_name} on {device} in {name}, canvas {size[0]}x{size[1]}, {told}; no safety checker runs")
    common = {
        "prompt": prompt, "negative": negative, "steps": steps, "guidance": guidance, "size": list(size),
        "scheduler": scheduler or type(own).__name__, "base": base_name, "base_sha256": folder_hash(base.folder),
        "conditions": records, "device": str(device), "dtype": name, "versions": _versions(),
    }  # fmt: skip
    with _bar(quiet) as on_step:
        images = generate(base, prompt, placed, size, seeds, negative, steps, guidance, scheduler, on_step)
        for seed, image in images:
            made = {**common, "seed": seed}
            png = png_bytes(image, _png_text(made))
            target = targets[seed]
            if target is None:
                sys.stdout.buffer.write(png)
                sys.stdout.flush()
            else:
                write_file(target, png)
                tell({"output": str(target), **made}, as_json)


def _place(maps, base: Base, size: tuple[int, int], offline: bool, strict: bool) -> tuple[list[Placed], list[dict]]:
    """Each condition on the canvas with its ControlNet, and its record. A net is loaded once."""
    from controlnet.model.base import resolve
    from controlnet.model.canvas import to_canvas
    from controlnet.model.checkpoint import NET_FILES, load_controlnet
    from controlnet.model.generate import Placed
    from controlnet.model.hashes import folder_hash
    from controlnet.model.registry import BASES
    from controlnet.preprocessors.doubts import doubts
    from controlnet.preprocessors.skeleton import from_text

    nets: dict[str, Any] = {}
    placed, records = [], []
    for flag, kind, map_, fields in maps:
        known = BASES.get(base.name)
        source = flag.net or (known.nets.get(kind) if known else None)
        if source is None:
            has = (
                f"{base.name} has nets for: {', '.join(known.nets)}"
                if known and known.nets
                else f"no net is known for base {base.name}"
            )
            raise ModelError(f"{flag.path}: no ControlNet for kind {kind!r}; {has}", f"--cond {flag.path},net=FOLDER")
        folder = resolve(source, offline, NET_FILES, f"--cond {flag.path},net=FOLDER")
        if source not in nets:
            nets[source] = load_controlnet(folder, base.dtype, base.unet.config, base.name).to(base.device)
        for doubt in doubts(map_, kind, size):
            if strict:
                raise InputError(f"{flag.path}: {doubt.text}", doubt.cure)
            warn(f"{flag.path}: {doubt.text}; {doubt.cure}")
        map_ = to_canvas(map_, kind, size, from_text(fields, flag.path))
        placed.append(Placed(map_, nets[source], flag.scale, flag.start, flag.end))
        records.append(fields | {"kind": kind, "net": source, "net_sha256": folder_hash(folder), "scale": flag.scale,
                                 "start": flag.start, "end": flag.end})  # fmt: skip
    return placed, records


def _png_text(made: dict) -> dict[str, str]:
    """Our JSON, and the `parameters` line that other tools read."""
    from controlnet.preprocessors.metadata import dump

    size = "x".join(map(str, made["size"]))
    lines = [made["prompt"], f"Negative prompt: {made['negative']}" if made["negative"] else ""]
    settings = f"Steps: {made['steps']}, Sampler: {made['scheduler']}, CFG scale: {made['guidance']:g}, "
    settings += f"Seed: {made['seed']}, Size: {size}, Model: {made['base']}"
    nets = "".join(f", ControlNet {i}: {c['kind']} weight {c['scale']:g}" for i, c in enumerate(made["conditions"]))
    return {**dump(made), "parameters": "\n".join(line for line in (*lines, settings + nets) if line)}


def _versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers
    from controlnet.preprocessors.detect import version

    return {
        "controlnet": version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def _silence_libraries() -> None:
    """The libraries talk on loading; what matters to a user is said here."""
    import os

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def _device(name: str | None):
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    if not available.get(name.split(":")[0]):
        raise UsageError(
            f"--device {name}: expected one of {', '.join(n for n, there in available.items() if there)}",
            "--device cpu",
        )
    return torch.device(name)


def _dtype(name: str | None, device):
    import torch

    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "float16", "bfloat16"):
        raise UsageError(f"--dtype {name}: expected float32, float16 or bfloat16", "--dtype float32")
    return getattr(torch, name)


class _bar:
    """A progress bar with the time left, on standard error, when someone is watching; as a context it gives on_step."""

    def __init__(self, quiet: bool):
        self.progress = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self):
        if self.progress is None:
            return lambda done, of: None
        self.progress.start()
        task = self.progress.add_task("generate", total=None)
        return lambda done, of: self.progress.update(task, completed=done, total=of)

    def __exit__(self, *_):
        if self.progress:
            self.progress.stop()
