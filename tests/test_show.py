"""`--show`: pictures in the terminal."""

import io
import sys

import numpy as np
import pytest
from controlnet.cli import bars, show
from controlnet.preprocessors.errors import Exit
from helpers import run
from PIL import Image
from rich.console import Console


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save("photo.png")
    return "photo.png"


def test_each_result_is_drawn(photo, monkeypatch, capsys):
    pytest.importorskip("textual_image")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    screen = io.StringIO()
    monkeypatch.setattr(show, "_console", Console(file=screen, width=80))
    assert not bars._is_watched(quiet=False)
    show.show(photo)
    drawn = [line for line in screen.getvalue().splitlines() if line.strip()]
    assert len(drawn) == show.HEIGHT and len(set("".join(drawn))) >= 3


def test_a_terminal_that_cannot_is_told_of_once(photo, monkeypatch, capsys):
    pytest.importorskip("textual_image")
    monkeypatch.setattr(show, "_console", Console(file=io.StringIO()))
    for _ in range(2):
        show.show("gone.png")
    assert capsys.readouterr().err.count("the terminal shows no pictures") == 1


def test_standard_output_must_be_a_terminal(photo, capsys):
    assert run("detect", "canny", photo, "--show") == Exit.USAGE
    assert "not a terminal" in capsys.readouterr().err


def test_the_extra_is_named(photo, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "textual_image.renderable", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("detect", "canny", photo, "--show") == Exit.USAGE
    assert "pip install 'controlnet-toolkit[show]'" in capsys.readouterr().err


def test_it_is_off_by_default(photo, capsys):
    assert run("detect", "canny", photo) == 0
    assert capsys.readouterr().out == "photo.canny.png\n" and not show.is_on()
