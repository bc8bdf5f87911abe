"""README and docs tell the truth about the code, the commands and the exit codes."""

import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from controlnet.cli.help import EXAMPLES
from controlnet.cli.main import app
from controlnet.model.work.condition import parse_condition
from controlnet.preprocessors.errors import Exit
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
sys.path.insert(0, str(ROOT / "docs"))
import reference  # noqa: E402


def tree(text: str) -> set[str]:
    """Paths of the tree in a page: an entry's folder is told by its indent or written out."""
    block = text.split("# The code\n\n", 1)[1].split("\n\n", 1)[0]
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
    told = {p for p in tree(DOCS["code.md"]) if p.endswith(".py")}
    there = {
        str(path.relative_to(ROOT))
        for folder in ("cli", "model", "preprocessors", "examples", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert told == there
    for text in (README, DOCS["code.md"]):
        assert all((ROOT / p).is_dir() for p in tree(text) if p.endswith("/"))


def test_links_and_pictures_exist():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in DOCS.values())]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text):
            assert (folder / target).exists(), target


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200


def test_what_follows_from_the_code_is_not_stale():
    """`make docs` writes it."""
    assert DOCS["commands.md"] == reference.reference()
    for text in DOCS.values():
        assert reference.numbered(text) == text


def test_every_page_is_in_the_site():
    nav = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())["project"]["nav"]
    listed = set(re.findall(r"'(\w[\w-]*\.md)'", str(nav)))
    assert DOCS.keys() <= listed


def test_the_site_builds(tmp_path):
    """Without a network, and without a warning; a link to a line of code leads to that line."""
    pytest.importorskip("zensical")
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    idea = (tmp_path / "site" / "idea.html").read_text()
    page, place = re.search(r'href="(code/model/control/zero.py.html)#([\w-]+)"', idea).groups()
    code = (tmp_path / "site" / page).read_text()
    line = re.search(rf'id="{place}".*?\n', code)[0]
    assert "zero_conv" in line or "ControlledBlock" in line
    assert "One prompt with its conditions" in (tmp_path / "site" / "names.html").read_text()


def test_the_python_examples_run(tmp_path, monkeypatch):
    """Each indented block that begins with an import, where a photo lies."""
    import skimage.data
    from PIL import Image

    Image.fromarray(skimage.data.coffee()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", DOCS["python.md"], re.MULTILINE)
    examples = [textwrap.dedent(block) for block in blocks if re.match(r"\s*(from|import) ", block)]
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "python.md", "exec"), {})


def commands() -> list[str]:
    names = "detect|generate|replay|score|report|train|status|dataset|models"
    text = "\n".join([README, *(text for name, text in DOCS.items() if name != "commands.md")])
    lines = re.findall(rf"^    (?:cat \S+ \| )?(controlnet (?:{names}) .*)$", text, re.MULTILINE)
    examples = [line for lines in EXAMPLES.values() for line in lines]
    return list(dict.fromkeys([re.sub(r"\s+(#|>).*", "", line) for line in lines] + examples))


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
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", DOCS["exit-codes.md"], re.MULTILINE))
    assert {int(code) for code in table} == set(Exit)


def test_no_package_folder_is_missing_from_the_wheel():
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    there = {
        f"controlnet.{p.parent.relative_to(ROOT)}".replace("/", ".")
        for f in ("cli", "model", "preprocessors")
        for p in (ROOT / f).rglob("__init__.py")
    }
    assert set(re.findall(r'"([\w.]+)"', listed)) == there
