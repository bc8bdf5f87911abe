"""`controlnet train DATA`: pairs or photos become a ControlNet; `controlnet status RUN` says how it goes."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from controlnet.cli.options import (
    BaseName,
    Device,
    Json,
    Offline,
    Quiet,
    Strict,
    default_base,
    field_docs,
    say,
    tell,
    warn,
)
from controlnet.model.registry import BASES
from controlnet.model.training.report import describe, draw_curve, draw_curves, read_run
from controlnet.model.training.runfolder import RunFolder, claimed, next_run
from controlnet.model.work.machine import keep_freed_memory, silence_libraries
from controlnet.model.work.outputs import keeps
from controlnet.model.work.processes import launch, stop_without_parent
from controlnet.preprocessors.devices import choose_device
from controlnet.preprocessors.errors import Exit, InputError, OutputError, UsageError
from controlnet.preprocessors.jsons import dumps
from controlnet.preprocessors.lock import ORPHANED, endings
from controlnet.preprocessors.weights import cache_folder

WORLD = "world"

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder of photos (captions in .txt or metadata.jsonl) or of pairs; shards: 'd/{000..999}.tar', "
        "URLs, '*.parquet', hf://datasets/USER/NAME; or `world`, the built-in scenes.",
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(help="The kind of condition; any word for your own. (default: taken from the data, canny for photos)"),
]
Config = Annotated[Path | None, typer.Option("--config", help="Settings from a TOML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeat. See --settings for all of them."),
]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", help="Folder of the run. (default: runs/DATA-N, the next free N)")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, or with the last run of DATA.")]
Processes = Annotated[int, typer.Option(help="Processes that share each batch.")]
Force = Annotated[bool, typer.Option("--force", help="Resume although data or settings changed.")]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, order, noise and crops. (default: 0)")]


def _settings(wanted: bool) -> None:
    if wanted:
        from controlnet.model.training.config import TrainConfig

        print("# defaults for Stable Diffusion; other bases have their own:")
        for name, known in BASES.items():
            if known.training:
                print(f"# {name}: {', '.join(f'{key} = {value:g}' for key, value in known.training.items())}")
        for field in fields(TrainConfig):
            print(f"{field.name:24} {field.default!s:10} {field_docs(TrainConfig).get(field.name, '')}".rstrip())
        raise typer.Exit


Settings = Annotated[
    bool, typer.Option("--settings", callback=_settings, is_eager=True, help="List all settings with their defaults.")
]


def train(
    data: Data,
    kind: Kind = None,
    base: BaseName = None,
    config: Config = None,
    set_: Set = None,
    out: Out = None,
    resume: Resume = False,
    processes: Processes = 1,
    force: Force = False,
    seed: Seed = None,
    device: Device = None,
    offline: Offline = False,
    as_json: Json = False,
    strict: Strict = False,
    quiet: Quiet = False,
    settings: Settings = False,
) -> None:
    from controlnet.preprocessors.data.stream import find_data, is_stream

    if processes < 1:
        raise UsageError(f"--processes {processes}: expected 1 or more", "--processes 2")
    world = data == WORLD and not Path(data).is_dir()
    found = None if world else find_data(data)
    main = int(os.environ.get("RANK", 0)) == 0  # of several processes, the one that writes
    if out is None and not resume and "RANK" in os.environ:
        raise UsageError("several processes, and each would number the run's folder", "-o runs/NAME names it")
    folder = out or next_run(Path(data), resume)
    run = RunFolder(folder)
    if resume and not run.holds_run:
        raise InputError(f"{folder}: no run to go on with", f"controlnet train {quote(data)}")
    if main and not resume and run.holds_run:
        raise UsageError(f"{folder}: holds a run already", "--resume to go on with it, or another -o")
    keeps(run.record, overwrite=True, skip_existing=False)
    silence_libraries()
    from controlnet.model.training.config import read_config

    files = [path for path in (resume and run.config, config) if path]
    defaults = {"base": default_base()} | ({"cache": False} if is_stream(data) else {})
    settings_of = read_config(files, set_ or [], defaults, base=base, seed=seed, kind=kind)
    with claimed(folder, numbered=not (out or resume)) as (folder, lock):
        if processes > 1 and "RANK" not in os.environ:
            raise typer.Exit(launch(processes, [*sys.argv[1:], *(["-o", str(folder)] if out is None else [])], lock))
        with _stoppable(folder):
            _train(found, folder, settings_of, resume, force, device, offline, as_json, strict, quiet)


@contextmanager
def _stoppable(folder: Path):
    """Before the first step SIGTERM ends the command as Ctrl-C does; after it the loop saves first. The same happens
    when its terminal or the command that started this process is gone."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in {ORPHANED, *endings()}}
    try:
        stop_without_parent()
        yield
    except KeyboardInterrupt:
        if RunFolder(folder).log.exists():
            say(f"stopped at once, without saving; from the last checkpoint on: --resume -o {folder}")
        else:
            say("stopped before the first step; what is in the cache stays there")
        raise typer.Exit(Exit.INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(found: Any, folder, config, resume, force, device, offline, as_json, strict, quiet):
    silence_libraries()
    keep_freed_memory()
    from controlnet.model.tiny.world import shards
    from controlnet.model.training import parallel
    from controlnet.model.training import run as training
    from controlnet.preprocessors.data import pairs

    found = found or pairs.find_pairs(shards.world_photos(cache_folder() / "world", report=say))
    kind, reason = pairs.kind_of_pairs(found, config.kind)
    reason = "the run's" if resume else reason
    config = replace(config, kind=kind)
    main = int(os.environ.get("RANK", 0)) == 0  # of several processes, the one that talks
    if main:
        is_whole = not hasattr(found, "shards")
        what = f"{len(found.pairs)} pairs" if is_whole else f"a stream of {len(found.shards):,} shards"
        say(
            f"{what} ({found.form}), kind {kind} ({reason}); base {config.base}, "
            f"{config.max_steps:,} steps of {config.batch_size * config.accumulation}; run in {folder}"
        )
        _warn_of(found)
    with _watcher(training.Watcher, quiet or not main, config.max_steps) as watcher:
        progress = training.train(found, config, folder, choose_device(device), resume, force, offline, watcher, strict)
    if main:
        state = _state(folder, at_work=False)
        for line in state["lines"]:
            say(line)
        if progress.step < config.max_steps:
            say(f"go on with: controlnet train {quote(str(found.folder))} --resume -o {quote(str(folder))}")
        tell({"output": str(folder)} | state, as_json)
    parallel.take_apart()
    if progress.step < config.max_steps and progress.seconds < 60 * config.minutes:
        raise typer.Exit(Exit.INTERRUPTED)


def _warn_of(found: Any) -> None:
    """Warn of what is odd about training data."""
    kinds = (("missing", found.missing), ("without a partner", found.extra), ("skipped", found.skipped))
    for what, names in kinds:
        if names:
            warn(f"{len(names)} files {what}, the first: {names[0]}; controlnet dataset check {found.folder}")
    without = sum(not pair.caption for pair in found.pairs)
    if without == len(found.pairs):
        warn("no pair has a caption: only the empty prompt is trained")
    elif without:
        warn(f"{without} of {len(found.pairs)} captions are empty: they train the empty prompt")
    if len(found.pairs) < 100 and not hasattr(found, "shards"):
        warn(f"only {len(found.pairs)} pairs: the network may learn them by heart")


@contextmanager
def _watcher(watcher: type, quiet: bool, max_steps: int):
    """Progress on standard error: bars when someone is watching, else a line for each look at the held-out pairs."""
    if quiet:
        yield watcher()
        return
    if not sys.stderr.isatty():
        yield watcher(say=say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # A bar appears when there is something to show on it.
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks = {}

        def on_item(what: str, of: int, done: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"caching {what}", total=of)
            bars.update(tasks[what], completed=done)

        def on_step(progress) -> None:
            if "steps" not in tasks:
                tasks["steps"] = bars.add_task("training", total=max_steps)
            bars.update(tasks["steps"], completed=progress.step, description=f"training, loss {progress.loss:.3f}")

        yield watcher(say=lambda text: console.print(text, highlight=False), on_item=on_item, on_step=on_step)


def _state(folder: Path, at_work: bool | None = None) -> dict:

    run = read_run(folder, at_work)
    last = run.validations[-1] if run.validations else {}
    return {
        "state": run.state,
        "verdict": run.verdict.word,
        "converged_at": run.verdict.step if run.verdict.word == "converged" else None,
        "begun_at": run.verdict.step,
        "lost_at": run.verdict.lost,
        "step": run.step,
        "max_steps": run.record["settings"]["max_steps"],
        "control_gap": last.get("control_gap"),
        "band": last.get("band"),
        "validation_loss": last.get("validation_loss"),
        "causes": run.verdict.causes,
        "lines": describe(run),
    }


def status(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs; several are put side by side.")],
    as_json: Json = False,
) -> None:

    states = [_state(run) for run in runs]
    if as_json:
        for run, state in zip(runs, states, strict=True):
            print(dumps({"output": str(run)} | state))
        return
    if len(runs) > 1:
        _print_side_by_side(runs, states)
        curves = runs[0].parent / "curves.png"
        with _warned("curves.png"):
            draw_curves([read_run(run) for run in runs], curves)
            print(f"look at {curves}")
        return
    (run,), (state,) = runs, states
    for line in state["lines"]:
        print(line)
    with _warned("curve.png"):
        draw_curve(read_run(run), RunFolder(run).curve)
    pictures = [str(p) for p in (RunFolder(run).curve, RunFolder(run).samples) if p.is_file()]
    if pictures:
        print("look at " + " and ".join(pictures))


@contextmanager
def _warned(name: str):
    """A picture that cannot be drawn into someone else's run is only a warning: the report is what counts."""
    try:
        yield
    except OutputError as error:
        warn(f"{name} not drawn: {error}")


def _print_side_by_side(runs: list[Path], states: list[dict]) -> None:
    """A row per run."""
    width = max(len(str(run)) for run in runs)
    print(f"{'run':{width}}  {'state':9} {'verdict':10} {'since':>7} {'step':>8} {'gap':>8} {'noise':>8} {'loss':>8}")
    for run, state in zip(runs, states, strict=True):
        numbers = [state[name] for name in ("control_gap", "band", "validation_loss")]
        told = " ".join(f"{'-' if value is None else format(value, '.4f'):>8}" for value in numbers)
        since = "-" if state["begun_at"] is None else f"{state['begun_at']:,}"
        print(f"{run!s:{width}}  {state['state']:9} {state['verdict']:10} {since:>7} {state['step']:>8,} {told}")
