"""What a shell is offered: commands, flags, names of the tables, keys of a condition; without a library."""

import os
import re
import subprocess
import sys

import pytest
from controlnet.cli.complete import NAMES, WORDS
from controlnet.cli.main import COMMANDS, app
from typer.main import get_command

PROGRAM = [sys.executable, "-m", "controlnet.cli.main"]


def offered(*words):
    """What bash would offer for a line that ends in the last of these words, which it takes apart at `=`."""
    parts = [part for word in ("controlnet", *words) for part in re.split("(=)", word)]
    environment = os.environ | {
        "_CONTROLNET_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(part for part in parts if part),
        "COMP_CWORD": str(len([part for part in parts[:-1] if part])),
    }  # fmt: skip
    code = (
        "import sys; from controlnet.cli.main import main; sys.argv[0] = 'controlnet'\n"
        "try: main()\n"
        "finally: print(*[m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ((""), ["detect", "generate", "train", "models"]),
        (("det",), ["detect"]),
        (("detect", ""), ["canny", "pose", "all"]),
        (("detect", "canny", "--au"), ["--auto"]),
        (("generate", "--base", "sd15"), ["sd15", "sd15-inpainting"]),
        (("generate", "--mode", ""), ["balanced", "guess"]),
        (("generate", "--scheduler", "un"), ["unipc"]),
        (("generate", "--base=sd15"), ["sd15", "sd15-inpainting"]),
        (("generate", "--cond", "a.png,"), ["a.png,detect=", "a.png,kind="]),
        (("generate", "--cond", "a.png,det"), ["a.png,detect=depth", "a.png,detect=pose"]),
        (("generate", "--cond", "a.png,sc"), ["a.png,scale=0.5", "a.png,scale=1"]),
        (("generate", "--cond", "a.png,detect="), ["depth", "pose"]),
        (("generate", "--cond", "a.png,detect=de"), ["depth"]),
        (("generate", "--cond", "a.png,scale=1,net=sd15-c"), ["sd15-canny"]),
        (("generate", "--cond", "a.png,scale=1,ki"), ["1,kind=canny", "1,kind=pose"]),
        (("detect", "depth", "--detector", "mi"), ["midas"]),
        (("models", "pull", "blaze"), ["blazepose"]),
        (("models", "convert", "a.pth", "b", "--to", ""), ["diffusers", "original"]),
        (("dataset", "build", "photos", "--to", ""), ["webdataset", "parquet"]),
    ],
)
def test_what_is_offered(words, some):
    assert set(some) <= set(offered(*([words] if isinstance(words, str) else words)))


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--cond", "photo.ca"),  # files, which the shell offers where nothing else is
        ("generate", "--cond", "a.png,net=runs/ph"),
        ("generate", "--base", "./sd"),
        ("detect", "depth", "--detector", "dwp"),  # of another kind
    ],
)
def test_nothing_is_offered(words):
    assert offered(*words) == []


def test_every_word_stands_for_a_parameter():
    group = get_command(app)
    names = set()

    def walk(command):
        import typer

        names.update(one.name for one in command.get_params(typer.Context(command)))
        for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
            walk(command.resolve_command(None, [name])[1])

    for name in COMMANDS:
        walk(group.resolve_command(None, [name])[1])
    assert {*WORDS, *NAMES} - {"net", "detect"} <= names  # these two are keys of a condition


def test_words_are_those_of_the_code():
    """Where they are written out because the module that has them imports torch."""
    from controlnet.model.engines.choose import ENGINES

    assert WORDS["engine"] == ENGINES


def test_small_commands_import_no_pydantic(tmp_path):
    """A quarter of their time."""
    from PIL import Image

    photo = Image.new("RGB", (64, 64))
    photo.paste("white", (16, 16, 48, 48))  # whose map is not empty, which would be told
    photo.save(tmp_path / "photo.png")
    code = (
        "import sys; from controlnet.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*[m for m in ('pydantic', 'torch') if m in sys.modules], file=sys.stderr)"
    )
    asked = ["detect", "canny", str(tmp_path / "photo.png"), "-o", str(tmp_path / "map.png"), "--size", "64"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "", done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--low", "50", "--high", "60"], ""),
        (["--low", "x"], "error: invalid value for '--low': x: expected a whole number\nhint: controlnet detect"),
        (["--processes", "1.5"], "error: invalid value for '--processes': 1.5: expected a whole number"),
        (["--lo", "1"], "error: no such option: --lo"),
    ],
)
def test_values_are_converted_as_before(tmp_path, flags, told, capsys):
    from helpers import run
    from PIL import Image

    photo = Image.new("RGB", (64, 64))
    photo.paste("white", (16, 16, 48, 48))  # whose map is not empty, which would be told
    photo.save(tmp_path / "photo.png")
    code = run("detect", "canny", tmp_path / "photo.png", "-o", tmp_path / "map.png", *flags)
    assert code == (2 if told else 0) and told in capsys.readouterr().err
