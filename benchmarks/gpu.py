"""Every figure that needs a GPU, in nine minutes at most: `python benchmarks/gpu.py [--parts ...] [--out FILE]`.

    sd15, sdxl            an evaluation: ours eager and as CUDA graphs, diffusers eager; batches; the products alone
    sd15-compiled, ...    the same compiled, beside diffusers compiled
    train                 a training step beside diffusers' and plain fine-tuning
    memory                an image with and without --low-memory

Each part runs in a process of its own and is stopped when its time is over; what it found until then is kept. Random
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

import torch

HERE = Path(__file__).parent
EVALUATIONS, ROUNDS = 10, 3
PARTS = {
    "sd15-compiled": 200, "sd15": 80, "sdxl": 90, "train": 100, "memory": 70, "sdxl-compiled": 300,
}  # fmt: skip
"""Seconds that each may take."""

GPU = torch.cuda.is_available()


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


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


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
    medians = {name: statistics.median(values) for name, values in times.items()}
    theirs = next((value for name, value in medians.items() if "diffusers" in name), float("nan"))
    reference = next(iter(results.values())).float()
    print(f"\n| {title} | ms | min ms | times diffusers | speed-up | per image ms | first call s | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name, median in medians.items():
        off = float((results[name].float() - reference).abs().max() / reference.std())
        print(f"| {name} | {1e3 * median:.2f} | {1e3 * min(times[name]):.2f} | {median / theirs:.2f} "
              f"| {theirs / median:.2f} | {1e3 * median / batch:.2f} | {first[name]:.1f} | {off:.1e} |")  # fmt: skip
    print(flush=True)


def roofline(title: str, function: Callable[[], Any], evaluations: int) -> None:
    from products import products_alone

    seconds, flops, by_name = products_alone(function)
    parts = ", ".join(f"{name.lstrip('_')} {1e3 * one / evaluations:.2f}" for name, one in by_name.items())
    print(f"{title}: products alone {1e3 * seconds / evaluations:.2f} ms an evaluation ({parts}); "
          f"{flops / evaluations / 1e12:.2f} TFLOP, {flops / seconds / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip


def machine(args) -> None:
    import diffusers

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


def sd15(args, half: torch.dtype, compile_it: bool) -> None:
    import generate as g

    torch.set_grad_enabled(False)
    device = torch.device("cuda" if GPU else "cpu")
    with device:  # to draw random weights takes a CPU longer than all else
        unet, nets = g.networks(args.small)
    both = g.Networks(unet, nets, device, half, True)
    side = 128 if args.small else 512
    variants: dict[str, Any] = {}
    if compile_it:
        own = compiled()
        theirs = g.Networks(unet, nets, device, half, True)
        how: dict[str, Any] = {"fullgraph": True, "mode": "reduce-overhead"}  # with CUDA graphs, the quickest of theirs
        theirs.pipeline.unet = torch.compile(theirs.unet, **how)
        theirs.references = [torch.compile(one, **how) for one in theirs.references]
        variants["ours, compiled"] = lambda *a, **k: both.ours(*a, **k, engine=own)
        variants["diffusers compiled"] = stepping(theirs.theirs)
        plan = [(1, variants), (8, variants)]
    else:
        ours = {f"ours, {name}": (lambda *a, e=e, **k: both.ours(*a, **k, engine=e)) for name, e in engines().items()}
        plan = [(batch, {**ours, "diffusers, eager": both.theirs}) for batch in (1, 2, 4, 8)]
    for batch, rows in plan[:1] if args.small else plan:
        named = {name: (lambda n, f=f, b=batch: f(n, side, b)) for name, f in rows.items()}
        compare(f"SD 1.5, {side}, batch {batch}", named, args.evaluations, batch)
        if not compile_it and batch in (1, 8):
            roofline(f"SD 1.5, batch {batch}", lambda b=batch: both.ours(2, side, b), 2)


def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell torch where a new evaluation begins, as it asks of those who use its graphs."""

    def run(*args: Any, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*args, **options)

    return run


def sdxl(args, half: torch.dtype, compile_it: bool) -> None:
    from sdxl import Networks

    device = torch.device("cuda" if GPU else "cpu")
    both = Networks(device, half, args.small)
    side = 128 if args.small else 1024
    if compile_it:
        own = compiled()
        variants = {"ours, compiled": lambda n, b: both.ours(n, side, engine=own, batch=b)}

        def compiled_theirs(n: int, batch: int) -> torch.Tensor:
            pipeline: Any = both.pipelines[0]
            if not hasattr(pipeline, "is_compiled"):
                pipeline.unet = torch.compile(pipeline.unet, fullgraph=True)
                pipeline.controlnet = torch.compile(pipeline.controlnet, fullgraph=True)
                pipeline.is_compiled = True
            return both.theirs(n, side, batch=batch)

        variants["diffusers compiled"] = compiled_theirs
        batches = [1]
    else:
        variants = {f"ours, {name}": (lambda n, b, e=e: both.ours(n, side, engine=e, batch=b))
                    for name, e in engines().items()}  # fmt: skip
        variants["diffusers, eager"] = lambda n, b: both.theirs(n, side, batch=b)
        batches = [1, 4]
    for batch in batches:
        named = {name: (lambda n, f=f, b=batch: f(n, b)) for name, f in variants.items()}
        compare(f"SDXL, {side}, batch {batch}", named, args.evaluations, batch)
        if not compile_it:
            with torch.no_grad():
                roofline(f"SDXL, batch {batch}", lambda b=batch: both.ours(1, side, batch=b), 1)
        gc.collect()


def others(args, half: torch.dtype, part: str) -> None:
    """Parts that other scripts measure."""
    small = ["--small"] * args.small
    if part == "train":
        for batch in (1, 4):
            more = ["--batch", str(batch), "--precision", "bfloat16", "--steps", "10", "--warmup", "3", "--no-reading"]
            subprocess.run([sys.executable, HERE / "train.py", *more, *small], check=False)
    else:
        subprocess.run([sys.executable, HERE / "generate.py", "--parts", "memory", *small], check=False)


def run_part(args) -> None:
    half = torch.float16 if GPU else torch.bfloat16
    name = args.part.removesuffix("-compiled")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if name in ("sd15", "sdxl"):
        {"sd15": sd15, "sdxl": sdxl}[name](args, half, args.part != name)
        if GPU:
            print(f"Peak memory of all together: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB.", flush=True)
    else:
        others(args, half, args.part)


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
            command = [sys.executable, __file__, "--part", part, "--evaluations", str(args.evaluations)]
            print(f"== {part}, at most {left:.0f} s", flush=True)
            start = time.monotonic()
            found = output([*command, *["--small"] * args.small], max(left, 1))
            note = f"({part}: {time.monotonic() - start:.0f} s)\n".encode()
            out.write(found + note)
            sys.stdout.buffer.write(found[-6000:] + note)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
