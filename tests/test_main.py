"""What the shell sees of the command: pipes that end, disks that are full, names that are no text."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.images import png_bytes

COMMAND = f"{shlex.quote(sys.executable)} -m controlnet.cli.main"


def shell(line, folder):
    """(exit code, standard output, standard error) of a line of bash, in bytes."""
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, capture_output=True)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path, photo):
    (tmp_path / "photo.png").write_bytes(png_bytes(photo))
    return tmp_path


def test_a_reader_that_leaves(folder):
    code, out, err = shell(f"{COMMAND} detect --list --json | head -c 10", folder)
    assert (code, out, err) == (Exit.PIPE, b'{"kind": "', b"") or (code, err) == (0, b"")  # it was quicker
    code, out, err = shell(f"{COMMAND} detect --list --json | python3 -c 'import os; os.close(0)'", folder)
    assert code in (0, Exit.PIPE) and err == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("line", ["detect canny photo.png -o -", "detect canny photo.png", "detect --list"])
def test_standard_output_that_is_full(folder, line):
    code, _, err = shell(f"{COMMAND} {line} > /dev/full", folder)
    assert code == Exit.OUTPUT and b"error: standard output: No space left" in err


def test_names_that_are_no_text(folder, photo):
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(png_bytes(photo))
    code, out, err = shell(f"{COMMAND} detect canny .", folder)
    assert code == 0, err
    assert out == b"caf\xe9.canny.png\nphoto.canny.png\n"
    code, out, _ = shell(f"{COMMAND} detect canny . --skip-existing --json", folder)
    assert [json.loads(line)["skipped"] for line in out.splitlines()] == [True, True]
    code, _, err = shell(f"{COMMAND} generate -p $'\\xe9'", folder)
    assert code == Exit.USAGE and b"not UTF-8" in err


def test_what_the_system_refuses_is_no_bug(folder):
    code, _, err = shell(f"{COMMAND} detect canny {'n' * 300}.png", folder)
    assert code == Exit.INPUT and b"no such file" in err
    code, _, err = shell(f"{COMMAND} detect canny photo.png -o {'n' * 300}.png", folder)
    assert code == Exit.OUTPUT and b"cannot be written" in err


def test_interrupted_in_the_middle(folder, photo):
    """What is done is told, at once, and nothing is half written."""
    for i in range(400):
        (folder / f"{i:03}.png").write_bytes(png_bytes(photo))
    process = subprocess.Popen(
        [sys.executable, "-m", "controlnet.cli.main", "detect", "canny", ".", "-o", "maps", "--size", "1024"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(2)
    out, err = process.communicate(timeout=120)
    told = {Path(line).name for line in (first + out).decode().split()}
    assert process.returncode == Exit.INTERRUPTED and b"Traceback" not in err
    there = {path.name for path in (folder / "maps").iterdir() if path.suffix != ".tmp"}
    assert told <= there and len(there - told) <= 2 * os.cpu_count() and len(there) < 401
