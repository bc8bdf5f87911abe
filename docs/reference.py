"""What in these pages follows from the code: the reference of the commands, and the numbers of lines in links.

python docs/reference.py          # writes both; a test says if they are stale
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "commands.md"
HEAD = """# Commands

Written by `make docs` from the commands themselves; `controlnet COMMAND --help` says the same in the shell.
"""


def reference() -> str:
    """The whole page."""
    import typer
    from controlnet.cli.main import COMMANDS, app

    group: Any = typer.main.get_command(app)
    lines = [HEAD]
    for name in COMMANDS:
        lines += _of_command(group, name, "controlnet", 2)
    return "\n".join(lines)


def _of_command(group: Any, name: str, before: str, level: int) -> Iterator[str]:
    """A heading, what it does, its arguments and flags, examples; then the same of its own commands."""
    import typer

    command = group.resolve_command(None, [name])[1]
    path = f"{before} {name}"
    parameters = [one for one in command.get_params(typer.Context(command)) if not one.hidden and one.name != "help"]
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    options = [one for one in parameters if one.param_type_name == "option"]
    own = command.list_commands(None) if hasattr(command, "list_commands") else []
    words = [*(one.display_name_raw for one in arguments), *["COMMAND"] * bool(own), *["[OPTIONS]"] * bool(options)]
    yield f"{'#' * level} {path}\n\n{_plain(command.help or '')}\n\n    {' '.join([path, *words])}\n"
    rows = [(f"`{one.display_name_raw}`", one) for one in arguments] + [(_flags(one), one) for one in options]
    if rows:
        yield "| | |\n|---|---|"
        yield from (f"| {what} | {_cell(one)} |" for what, one in rows)
        yield ""
    if command.epilog:
        yield "\n".join(f"    {line[2:]}" for line in _plain(command.epilog).split("\n\n")[1:]) + "\n"
    for one in own:
        yield from _of_command(command, one, path, level + 1)


def _flags(option: Any) -> str:
    """`-o`, `--out FILE`."""
    flags = sorted((*option.opts, *option.secondary_opts), key=len)
    return ", ".join(f"`{flag}`" for flag in [*flags[:-1], f"{flags[-1]} {option.metavar or ''}".strip()])


def _cell(parameter: Any) -> str:
    text = _plain(parameter.help or "")
    default = parameter.default
    if parameter.show_default is not False and isinstance(default, (str, int, float)) and default not in ("", False):
        text += f" Default: {default}."
    return text.replace("|", "\\|")


def _plain(text: str) -> str:
    """Help as Markdown, without the console's markup."""
    text = re.sub(r"(?<!\\)\[/?dim\]", "", text)
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(" ".join(part.split()) for part in paragraphs).replace("\\[", "[").replace("<", "&lt;")


LINE = re.compile(r"\[`(?P<name>\w+)`\]\(\.\./(?P<path>[\w/]+\.py)#L\d+\)")


def numbered(text: str) -> str:
    """A page in which each link [`name`](../file.py#L1) has the number of the line that defines the name. Raises
    ValueError if none does."""

    def link(match: re.Match) -> str:
        lines = (ROOT / match["path"]).read_text().splitlines()
        defines = re.compile(rf"(def|class) {match['name']}\b")
        found = [number for number, line in enumerate(lines, 1) if defines.match(line)]
        if not found:
            raise ValueError(f"{match['path']} defines no {match['name']}")
        return f"[`{match['name']}`](../{match['path']}#L{found[0]})"

    return LINE.sub(link, text)


def write() -> None:
    PAGE.write_text(reference())
    for page in PAGE.parent.glob("*.md"):
        page.write_text(numbered(page.read_text()))


if __name__ == "__main__":
    write()
