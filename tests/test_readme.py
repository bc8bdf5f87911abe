"""The README tells the truth about the code, the commands and the exit codes."""

import re
import textwrap
from pathlib import Path

import pytest
from controlnet.cli.main import app
from controlnet.model.work.condition import parse_condition
from controlnet.preprocessors.errors import Exit
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def tree() -> set[str]:
    """Paths of the tree in the README: an entry's folder is told by its indent or written out."""
    block = README.split("## The code\n\n", 1)[1].split("\n\n", 1)[0]
    paths, folders = set(), {}
    for line in block.splitlines():
        indent, name = re.match(r"( +)(\S+)", line).groups()
        depth = (len(indent) - 4) // 2
        path = "".join(folders[d] for d in range(depth)) + name
        if name.endswith("/"):
            folders[depth] = name
        paths.add(path)
    return paths


def test_the_tree_is_the_disk():
    told = {p for p in tree() if p.endswith(".py")}
    there = {
        str(path.relative_to(ROOT))
        for folder in ("cli", "model", "preprocessors", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert told == there
    assert all((ROOT / p).is_dir() for p in tree() if p.endswith("/"))


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_examples_run(tmp_path, monkeypatch):
    """Each indented block that begins with an import, where a photo lies."""
    import skimage.data
    from PIL import Image

    Image.fromarray(skimage.data.coffee()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.MULTILINE)
    examples = [textwrap.dedent(block) for block in blocks if re.match(r"\s*(from|import) ", block)]
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def commands() -> list[str]:
    names = "detect|generate|replay|score|report|train|status|dataset|models"
    lines = re.findall(rf"^    (?:cat \S+ \| )?(controlnet (?:{names}) .*)$", README, re.MULTILINE)
    return [re.sub(r"\s+(#|>).*", "", line) for line in lines]


@pytest.mark.parametrize("line", commands())
def test_commands_use_flags_that_exist(line):
    words = line.split()
    flags = [w for w in words if w.startswith("-") and w != "-"]
    kind = words[2:3] if words[1] in ("detect", "dataset", "models") and not words[2].startswith("-") else []
    shown = CliRunner().invoke(app, [words[1], *kind, "--help"], terminal_width=200).output
    assert all(re.search(rf"(?<![\w-]){flag}(?![\w-])", shown) for flag in flags), (flags, shown)
    for i, word in enumerate(words):
        if word == "--cond":
            parse_condition(words[i + 1])


def test_exit_codes():
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README.split("## Exit codes")[1], re.MULTILINE))
    assert {int(code) for code in table} == set(Exit)


def test_no_package_folder_is_missing_from_the_wheel():
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    there = {
        f"controlnet.{p.parent.relative_to(ROOT)}".replace("/", ".")
        for f in ("cli", "model", "preprocessors")
        for p in (ROOT / f).rglob("__init__.py")
    }
    assert set(re.findall(r'"([\w.]+)"', listed)) == there
