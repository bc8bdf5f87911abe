"""Every figure that needs a GPU, in nine minutes at most: `python benchmarks/gpu.py [--parts ...] [--out FILE]`.

    compiled        an evaluation, ours compiled beside diffusers compiled: SD 1.5 at batches 1 and 8, SDXL
    train           a training step beside diffusers' and plain fine-tuning, batches 1 and 4
    sd15, sdxl      an evaluation: ours eager and as CUDA graphs, diffusers eager; batches; the products alone
    memory          an image with and without --low-memory

Each part runs in a process of its own and is stopped when its time is over; what it found until then is kept. In the
first two, each row has a process of its own as well: they compile at the same time and are measured in turns. Random
weights, zero convolutions filled, both halves of the guidance, channels_last on both sides, float16; the same tensors
and noise in turn; the first round is not counted; medians. `--small` rehearses it on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from turns import Prepared, Row, in_turns, wait

HERE = Path(__file__).parent
EVALUATIONS, ROUNDS = 10, 3
PARTS = {"compiled": 260, "train": 120, "sd15": 80, "sdxl": 90, "memory": 70}
"""Seconds that each may take."""
COMPILED = [("sd15", 1), ("sd15", 8), ("sdxl", 1)]
"""Families and batches that are measured compiled."""
FASTEST: dict[str, Any] = {"fullgraph": True, "mode": "reduce-overhead"}
"""How diffusers' networks are compiled: with CUDA graphs, the quickest way of theirs."""

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WHOSE = ("ours", "diffusers")


def engines() -> dict[str, Any]:
    """The engines to compare; on a CPU, the same graphs without CUDA's recording."""
    from controlnet.model.engines.engine import Eager
    from controlnet.model.engines.graphs import Graphs

    if not GPU:
        return {"eager": Eager()}
    return {"eager": Eager(), "CUDA graphs": Graphs()}


def compiled() -> Any:
    from controlnet.model.engines.graphs import Compiled

    return Compiled()


def compare(title: str, variants: dict[str, Callable[[int], torch.Tensor]], evaluations: int, batch: int) -> None:
    """A table of milliseconds per evaluation; ratios to the first one that is diffusers'."""
    times: dict[str, list[float]] = {}
    results, first = {}, {}
    for name, function in variants.items():
        start = time.perf_counter()
        try:
            results[name] = function(evaluations)
            wait()
            times[name], first[name] = [], time.perf_counter() - start
        except Exception as error:  # the others are measured all the same
            print(f"{title}: {name} failed: {type(error).__name__}: {str(error)[:600]}", flush=True)
    for _ in range(ROUNDS):
        for name in times:
            start = time.perf_counter()
            variants[name](evaluations)
            wait()
            times[name].append((time.perf_counter() - start) / evaluations)
    table(title, times, first, results, batch)


def table(title: str, times: dict[str, list[float]], first: dict[str, float], results: dict, batch: int) -> None:
    """The medians of seconds in `times`, with ratios; `first` is the first call's. `results`, where there are some,
    are compared with the first one."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    theirs = next((value for name, value in medians.items() if "diffusers" in name), float("nan"))
    reference = next(iter(results.values()), None)
    print(f"\n| {title} | ms | min ms | times diffusers | speed-up | per image ms | first call s | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name, median in medians.items():
        off = "" if reference is None else f"{difference(results[name], reference):.1e}"
        print(f"| {name} | {1e3 * median:.2f} | {1e3 * min(times[name]):.2f} | {median / theirs:.2f} "
              f"| {theirs / median:.2f} | {1e3 * median / batch:.2f} | {first[name]:.1f} | {off} |")  # fmt: skip
    print(flush=True)


def difference(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest one, in deviations of the reference."""
    result, reference = result.float().cpu(), reference.float().cpu()
    return float((result - reference).abs().max() / reference.std())


def roofline(title: str, function: Callable[[], Any], evaluations: int) -> None:
    from products import products_alone

    seconds, flops, by_name = products_alone(function)
    parts = ", ".join(f"{name.lstrip('_')} {1e3 * one / evaluations:.2f}" for name, one in by_name.items())
    print(f"{title}: products alone {1e3 * seconds / evaluations:.2f} ms an evaluation ({parts}); "
          f"{flops / evaluations / 1e12:.2f} TFLOP, {flops / seconds / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip


def machine(args) -> None:
    name = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, diffusers {diffusers.__version__}")
    if not GPU:
        return
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    x, y = (torch.empty(2**30, device="cuda", dtype=torch.float32) for _ in range(2))
    for what, run, amount in (
        ("product of 8192^3, float16: {:.0f} TFLOP/s", lambda: a @ b, 2 * 8192**3 / 1e12),
        ("copy of 4 GiB: {:.2f} TB/s read and written", lambda: y.copy_(x), 8 * 2**30 / 1e12),
    ):
        for _ in range(3):
            run()
        wait()
        start = time.perf_counter()
        for _ in range(10):
            run()
        wait()
        print(what.format(10 * amount / (time.perf_counter() - start)), flush=True)


def sd15(args, half: torch.dtype) -> None:
    import generate as g

    torch.set_grad_enabled(False)
    with DEVICE:  # to draw random weights takes a CPU longer than all else
        unet, nets = g.networks(args.small)
    both = g.Networks(unet, nets, DEVICE, half, True)
    side = 128 if args.small else 512
    variants = {f"ours, {name}": (lambda *a, e=e: both.ours(*a, engine=e)) for name, e in engines().items()}
    variants["diffusers, eager"] = both.theirs
    for batch in [1] if args.small else [1, 2, 4, 8]:
        named = {name: (lambda n, f=f, b=batch: f(n, side, b)) for name, f in variants.items()}
        compare(f"SD 1.5, {side}, batch {batch}", named, args.evaluations, batch)
        if batch in (1, 8):
            roofline(f"SD 1.5, batch {batch}", lambda b=batch: both.ours(2, side, b), 2)


def sdxl(args, half: torch.dtype) -> None:
    from sdxl import Networks

    both = Networks(DEVICE, half, args.small)
    side = 128 if args.small else 1024
    variants: dict[str, Any] = {}
    for name, engine in engines().items():
        variants[f"ours, {name}"] = lambda n, b, e=engine: both.ours(n, side, engine=e, batch=b)
    variants["diffusers, eager"] = lambda n, b: both.theirs(n, side, batch=b)
    for batch in (1, 4):
        named = {name: (lambda n, f=f, b=batch: f(n, b)) for name, f in variants.items()}
        compare(f"SDXL, {side}, batch {batch}", named, args.evaluations, batch)
        with torch.no_grad():
            roofline(f"SDXL, batch {batch}", lambda b=batch: both.ours(1, side, batch=b), 1)
        gc.collect()


def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell torch where a new evaluation begins, as it asks of those who use its graphs."""

    def run(*args: Any, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*args, **options)

    return run


def prepare_compiled(family: str, whose: str, batch: int, small: bool, count: int) -> Prepared:
    """An evaluation of a family (sd15, sdxl) with compiled networks, `whose` are ours or diffusers'."""
    diffusers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    half = torch.float16 if GPU else torch.bfloat16
    both: Any
    if family == "sd15":
        import generate as g

        with DEVICE:
            unet, nets = g.networks(small)
        both, side = g.Networks(unet, nets, DEVICE, half, True), 128 if small else 512
    else:
        import sdxl as x

        both, side = x.Networks(DEVICE, half, small), 128 if small else 1024
    if whose == "ours":
        own = compiled()
        return Prepared(
            lambda n: both.ours(n, side, batch=batch, engine=own), count, lambda n: both.ours(n, side, batch=batch)
        )
    theirs = both.theirs(count, side, batch=batch)  # before they are compiled
    compile_theirs(both, family)
    step = stepping(both.theirs)
    return Prepared(lambda n: step(n, side, batch=batch), count, lambda n: theirs)


def compile_theirs(both: Any, family: str) -> None:
    """Have torch compile the networks of diffusers' pipeline."""
    pipeline = both.pipeline if family == "sd15" else both.pipelines[0]
    pipeline.unet = torch.compile(pipeline.unet, **FASTEST)
    if family == "sd15":
        both.references = [torch.compile(one, **FASTEST) for one in both.references]
    else:
        pipeline.controlnet = torch.compile(pipeline.controlnet, **FASTEST)


def of_compiled(args, seconds: float) -> None:
    rows = in_turns(
        prepare_compiled,
        [(family, whose, batch, args.small, args.evaluations) for family, batch in COMPILED for whose in WHOSE],
        seconds,
    )
    for family, batch in COMPILED:
        found = {f"{job[1]}, compiled": row for job, row in rows.items() if (job[0], job[2]) == (family, batch)}
        show(f"{family}, batch {batch}", found, batch)


def prepare_step(variant: str, batch: int, small: bool) -> Prepared:
    """Training steps of a variant of train.py."""
    import train

    # As in train.py: tuning the UNet gets its latents and texts for nothing, so that only the networks are compared.
    args = argparse.Namespace(small=small, batch=batch, precision="bfloat16", cached=variant == "tune")
    step = train.step_of(variant, args, DEVICE)

    def run(n: int) -> None:
        for _ in range(n):
            step()

    return Prepared(run, 1 if small else 10)


def of_steps(args, seconds: float) -> None:
    from train import VARIANTS

    for batch in (1, 4):
        rows = in_turns(prepare_step, [(variant, batch, args.small) for variant in VARIANTS], seconds / 2)
        show(f"training step, batch {batch}", {job[0]: row for job, row in rows.items()}, batch)


def show(title: str, rows: dict[str, Row], batch: int) -> None:
    """The table of rows that were measured in turns, with how far each is from the same not compiled."""
    rows = {name: row for name, row in rows.items() if row.seconds}
    if not rows:
        return
    made = {name: row.result for name, row in rows.items() if row.result is not None}
    table(title, {k: row.seconds for k, row in rows.items()}, {k: row.first for k, row in rows.items()}, made, batch)
    for name, row in rows.items():
        rounds = ", ".join(f"{1e3 * one:.2f}" for one in row.seconds)
        off = "" if row.off is None else f"{row.off:.1e} from the same not compiled; "
        print(f"{name}: rounds {rounds} ms; {off}{row.peak:.2f} GB", flush=True)


def run_part(args) -> None:
    half = torch.float16 if GPU else torch.bfloat16
    diffusers.utils.logging.set_verbosity_error()
    if args.part in ("compiled", "train"):
        {"compiled": of_compiled, "train": of_steps}[args.part](args, 0.85 * args.seconds)
    elif args.part == "memory":
        more = ["--small"] * args.small
        subprocess.run([sys.executable, HERE / "generate.py", "--parts", "memory", *more], check=False)
    else:
        {"sd15": sd15, "sdxl": sdxl}[args.part](args, half)
        if GPU:
            print(f"Peak memory of all together: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB.", flush=True)


def output(command: list, seconds: float) -> bytes:
    """What a process prints within so many seconds; it is stopped after them, with all that it started."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0] + b"\nstopped: its time is over\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--part", choices=PARTS, help="one, in this process")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--out", type=Path, default=Path("gpu.md"))
    parser.add_argument("--small", action="store_true", help="narrow networks, to try the script")
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return
    machine(args)
    begun = time.monotonic()
    with args.out.open("ab", buffering=0) as out:
        for part in args.parts.split(","):
            left = min(PARTS[part], args.seconds - (time.monotonic() - begun))
            command = [sys.executable, __file__, "--part", part, "--seconds", str(left)]
            command += ["--evaluations", str(args.evaluations)]
            print(f"== {part}, at most {left:.0f} s", flush=True)
            start = time.monotonic()
            found = output([*command, *["--small"] * args.small], max(left, 1))
            note = f"({part}: {time.monotonic() - start:.0f} s)\n".encode()
            out.write(found + note)
            sys.stdout.buffer.write(found[-6000:] + note)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
