"""The scripts of benchmarks/ and of the world: what they import is there, and the large ones run on small networks."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

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
