"""The scripts of benchmarks/ and of the world: what they import is there, and the large ones run on small networks."""

import ast
import importlib
import subprocess
import sys
import time
from itertools import count
from operator import attrgetter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path):
    """Also inside functions, which nothing else looks at."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("controlnet"):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("args", [
    ["generate.py", "--small", "--image", "64"],
    ["sdxl.py", "--small", "--side", "64", "--rounds", "1"],
], ids=lambda args: " ".join(args))  # fmt: skip
def test_a_script_runs_on_small_networks(args):
    command = [sys.executable, str(ROOT / "benchmarks" / args[0]), *args[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "|" in done.stdout, done.stderr


def test_what_is_clocked_in_an_image_is_there(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for _, module, path in importlib.import_module("first_image").CLOCKED:
        attrgetter(path)(importlib.import_module(module))


def prepared(name: str):
    """What the processes of the next test measure."""
    turns = importlib.import_module("turns")
    if name == "fails":
        raise ValueError("this one cannot be made")
    if name == "hangs":
        time.sleep(600)
    calls = count(1)

    def run(n: int) -> torch.Tensor:
        if name == "breaks" and next(calls) == 3:  # the first call is not of a round
            raise ValueError("this one ends in its second round")
        return torch.full((2,), 1.5) * n

    return turns.Prepared(run, 2, lambda n: torch.tensor([1.0, 2.0]) * n)


def test_rows_are_measured_in_turns(monkeypatch, capfd):
    """Those that are ready, each in a process of its own; the others are named, and hold nothing up."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    turns = importlib.import_module("turns")
    assert sorted(turns.in_turns(prepared, [("hangs",), ("one",)], 20, rounds=1)) == [("one",)]
    rows = turns.in_turns(prepared, [("one",), ("fails",), ("breaks",), ("two",)], 120, rounds=2)
    assert sorted(rows) == [("one",), ("two",)]
    for row in rows.values():
        assert len(row.seconds) == 2 and all(0 < one < 1 for one in (*row.seconds, row.first))
        assert row.off == pytest.approx(1 / 2**0.5)  # off by 1 of a deviation of 2 / sqrt(2)
        assert row.result.tolist() == [3, 3]
    told = capfd.readouterr()
    assert "('fails',): failed" in told.out and "('breaks',): failed" in told.out
    assert "('hangs',): not ready in 20 s" in told.out
    assert "this one cannot be made" in told.err and "this one ends in its second round" in told.err


@pytest.mark.slow
def test_sdxl_at_full_size():
    """UNet, ControlNet and union with SDXL's own sizes, in bfloat16 on a small canvas: equal to diffusers' within the
    type's rounding, in at most 22 GB for both."""
    command = [sys.executable, str(ROOT / "benchmarks/sdxl.py"), "--side", "128", "--evaluations", "1", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| one Control", "| a union"))]
    assert done.returncode == 0 and len(rows) == 2, done.stderr
    assert all(0 <= float(row[5]) <= 0.1 for row in rows), done.stdout
    assert float(done.stdout.split("together: ")[1].split()[0]) <= 22
