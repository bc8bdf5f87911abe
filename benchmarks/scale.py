"""From one process to many: batches here, in two processes and on Ray; what training adds for each process.

    python benchmarks/scale.py [--parts batches,reduce,checkpoints] [--rounds 3]

Batches: images by `tiny`, one thread for each process; the pace is the slope between few and many images, so that
imports and Ray's start do not count; each image is a job of its own, made alone. Training: gradients and states of the
size of SD 1.5's ControlNet, two processes of this machine over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

FEW, MANY = 4, 28
STEPS = 30
"""Makes an image by `tiny` take one core a second or two."""
WAYS = {
    "one process": [],
    "two processes": ["--processes", "2"],
    "Ray, two actors": ["--ray", "local"],
    "Ray, one actor": ["--ray", "127.0.0.1:6399"],
}
PARAMETERS = 361_279_120
"""Of SD 1.5's ControlNet."""


def batches(rounds: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cv2.imwrite(
            f"{folder}/a.canny.png", cv2.Canny(np.kron(np.eye(8), np.ones((64, 64))).astype(np.uint8) * 255, 9, 9)
        )

        def timed(count: int, more: list[str]) -> float:
            # Other steps for each second job, so that none is sampled together with its neighbour.
            jobs = [{"cond": "a.canny.png", "prompt": "x", "seed": i, "steps": STEPS + i % 2} for i in range(count)]
            (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
            out = tempfile.mkdtemp(dir=folder)
            command = [sys.executable, "-m", "controlnet.cli.main", "generate", "--jobs", "jobs.jsonl"]
            began = time.perf_counter()
            subprocess.run([*command, "-q", "-o", f"{out}/", *more], cwd=folder, env=environment, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            return time.perf_counter() - began

        paces: dict[str, list[float]] = {way: [] for way in WAYS}
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        start = [*ray, "start", "--head", "--num-cpus=1", "--port=6399", "--include-dashboard=false"]
        for _ in range(rounds):
            for way, more in WAYS.items():
                if way == "Ray, one actor":
                    subprocess.run(start, check=True, env=environment, stdout=subprocess.DEVNULL)
                few, many = timed(FEW, more), timed(MANY, more)
                paces[way].append((many - few) / (MANY - FEW))
                if way == "Ray, one actor":
                    subprocess.run([*ray, "stop"], check=True, stdout=subprocess.DEVNULL)
        alone = statistics.median(paces["one process"])
        for way, found in paces.items():
            pace = statistics.median(found)
            spread = f"{min(found):.3f} to {max(found):.3f}"
            print(f"{way:16} {pace:6.3f} s an image ({spread}), {alone / pace:5.2f} times as quick as one process")


REDUCE = """
import sys, time, torch, torch.distributed as dist
from datetime import timedelta
dist.init_process_group("gloo")
flat = torch.ones({n})
parts = flat.split(25 * 2**20 // 4)  # DDP's buckets
for name in ("one message", "buckets of 25 MiB"):
    times = []
    for _ in range({rounds}):
        dist.barrier()
        began = time.perf_counter()
        if name == "one message":
            dist.all_reduce(flat)
        else:
            for work in [dist.all_reduce(part, async_op=True) for part in parts]:
                work.wait()
        times.append(time.perf_counter() - began)
        flat.fill_(1)
    if dist.get_rank() == 0:
        print(f"all-reduce of {{4 * {n} / 1e9:.2f}} GB, {{name}}: {{sorted(times)[len(times) // 2]:.2f}} s", flush=True)
dist.destroy_process_group()
"""


def reduce(rounds: int) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as name:
        script = Path(name, "reduce.py")
        script.write_text(REDUCE.format(n=PARAMETERS, rounds=rounds))
        subprocess.run([*launch, str(script)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


CHECKPOINT = """
import os, sys, time, torch
from pathlib import Path
from torch import nn
from controlnet.model.training.checkpoints import Checkpoints
from controlnet.model.training.parallel import Parallel
from controlnet.model.training.state import State
torch.manual_seed(0)
net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range({layers})])
parallel = Parallel(torch.device("cpu"))
state = State(net, "adamw", 1e-4, 0.0, "float32", parallel)
state.with_moments()
saved = Checkpoints(Path(sys.argv[1]), keep=1)
for step in range({rounds}):
    parallel.wait()
    began = time.perf_counter()
    saved.save(state, step)
    wrote = time.perf_counter() - began
    parallel.wait()
    began = time.perf_counter()
    saved.load(state)
    read = time.perf_counter() - began
    if parallel.is_main:
        kind = "shards of two processes" if parallel.is_sharded else "one file"
        size = 16 * {layers} * 1024 * 1025 / 1e9
        print(f"state of {{size:.2f}} GB, {{kind}}: {{wrote:.2f}} s written, {{read:.2f}} s read", flush=True)
"""


def checkpoints(rounds: int) -> None:
    """A quarter of that size, so that two states fit the memory of a small machine."""
    layers = PARAMETERS // 4 // (1024 * 1025)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as name:
        script = Path(name, "checkpoint.py")
        script.write_text(CHECKPOINT.format(layers=layers, rounds=rounds))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, str(script), f"{name}/one"], check=True, env=environment)
        subprocess.run([*launch, str(script), f"{name}/shards"], check=True, env=environment | sharded)


PARTS = {"batches": batches, "reduce": reduce, "checkpoints": checkpoints}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for part in given.parts.split(","):
        PARTS[part](given.rounds)


if __name__ == "__main__":
    main()
