"""`-v` and `--log FILE`."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.log import LOG, doing
from helpers import run
from PIL import Image


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("photo.png")
    return "photo.png"


def test_what_is_done_is_said(photo, capsys):
    assert run("detect", "canny", photo) == 0
    assert "opencv" not in capsys.readouterr().err
    assert run("detect", "canny", photo, "-v", "--overwrite") == 0
    out, err = capsys.readouterr()
    assert out == "photo.canny.png\n"
    assert re.search(r"^canny by opencv on 512x512: 0\.\d\d s$", err, re.MULTILINE)
    assert run("detect", "canny", photo, "--overwrite") == 0  # of this command alone
    assert "opencv" not in capsys.readouterr().err


def test_a_file_has_all_of_it_with_the_time(photo, tmp_path, capsys):
    log = tmp_path / "logs" / "run.log"
    for _ in range(2):
        asked = ("--prompt", "a red cube", "--steps", "2", "--size", "128", "--seed", "1", "-o", "a.png", "--overwrite")
        assert run("generate", *asked, "--log", log) == 0
    err = capsys.readouterr().err
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line) for line in lines)
    text = "\n".join(line[24:] for line in lines)
    for what in (
        "loading unet: ",
        "sampling of 1 at 128x128 in 2 steps by eager: ",
        "decoding: ",
        "canvas 128x128, seed 1",
    ):
        assert text.count(what) == 2
    assert "canvas 128x128" in err and "loading unet" not in err


def test_a_file_has_errors_and_what_was_written(photo, capsys):
    assert run("detect", "canny", photo, "--log", "run.log") == 0
    assert run("detect", "canny", "gone.png", "--log", "run.log") == Exit.INPUT
    text = "\n".join(line[24:] for line in Path("run.log").read_text().splitlines())
    assert "written: photo.canny.png" in text and "error: gone.png: no such file" in text and "hint: ls" in text


def test_a_log_that_cannot_be_written(photo, capsys):
    assert run("detect", "canny", photo, "--log", "photo.png/run.log") == Exit.OUTPUT
    assert "--log photo.png/run.log: cannot be written" in capsys.readouterr().err


def test_what_fails_is_logged(caplog):
    with caplog.at_level(logging.INFO, LOG.name), pytest.raises(KeyError), doing("a thing"):
        raise KeyError
    assert re.fullmatch(r"a thing: failed after 0\.\d\d s \(KeyError\)", caplog.messages[0])


def test_a_log_never_grows_into_another_file(photo, capsys):
    before = Path(photo).read_bytes()
    assert run("detect", "canny", photo, "--log", photo) == Exit.OUTPUT
    assert "is not a log" in capsys.readouterr().err and Path(photo).read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_disk_that_is_full_is_told_of_once(photo, capsys):
    assert run("detect", "canny", photo, "--log", "/dev/full") == 0
    out, err = capsys.readouterr()
    assert out == "photo.canny.png\n" and err.count("warning: --log /dev/full") == 1 and "Traceback" not in err
