"""What help pages show besides each flag's own words, and shells offer: what its value is, and examples at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from controlnet.cli import show, verbose
from controlnet.cli.complete import completion_of
from controlnet.cli.values import quicken

EXAMPLES = {
    "": ("controlnet detect canny photo.jpg", 'controlnet generate --cond photo.canny.png --prompt "..."'),
    "detect": (
        "controlnet detect canny photo.jpg",
        "controlnet detect pose photos/ -r -o maps/",
        "controlnet detect all photo.jpg --preview sheet.png",
    ),
    "generate": (
        'controlnet generate --cond photo.canny.png --prompt "a red house" --num 4 --seed 7',
        'controlnet generate --base sd15 --cond photo.jpg,detect=depth,scale=0.8 --prompt "..."',
        'controlnet generate --init photo.jpg --strength 0.6 --cond @init,detect=canny --prompt "..."',
        "controlnet generate --jobs jobs.jsonl -o set/ --skip-existing",
    ),
    "train": (
        "controlnet train photos/",
        "controlnet train data/ --base sd15 --set max_steps=20000 --set batch_size=4",
        "controlnet train data/ --resume",
    ),
    "status": ("controlnet status runs/photos-1", "controlnet status runs/a runs/b --json"),
    "score": (
        "controlnet score out/7-photo.png",
        "controlnet score photo.png --cond photo.canny.png --overlay overlay.png",
        "controlnet score --jobs scores.jsonl --json",
    ),
    "report": ("controlnet report out/ --open", "controlnet report runs/a runs/b -o compared.html"),
    "replay": ("controlnet replay out/7-photo.png", "controlnet replay out/7-photo.png --hires 2x -o large.png"),
    "check": ("controlnet check map.png --kind pose", "controlnet check maps/ --size 768x512 --fix -o mended/"),
    "doctor": ("controlnet doctor",),
    "dataset": ("controlnet dataset check data/", "controlnet dataset build photos/ --kind canny -o data/"),
    "models": (
        "controlnet models list",
        "controlnet models pull sd15 sd15-canny",
        "controlnet models convert net.pth canny/ --to diffusers",
    ),
}
"""By the command's name, and "" for the program itself. In Rich's markup: a bracket is written \\[."""
SHOWING = ("detect", "generate", "replay")
"""Commands that make pictures."""
VALUES = {"str": "TEXT", "int": "N", "float": "NUMBER", "Path": "PATH"}


def finish(command: Any, name: str) -> Any:
    """The same command with its flags' values named, and its examples at the end of its page; its own commands too."""
    if not hasattr(command, "list_commands"):
        command.params += [*show.parameters()] * (name.split()[0] in SHOWING) + verbose.parameters()
    command.get_params = partial(named, command.get_params)
    if name in EXAMPLES:
        command.epilog = examples(name)
    for own, one in getattr(command, "commands", {}).items():
        finish(one, f"{name} {own}")
    return command


def examples(name: str) -> str:
    """The end of a page."""
    return "\n\n".join(["Examples:", *(f"[dim]$[/dim] {line}" for line in EXAMPLES[name])])


def named(parameters_of: Callable[[Any], list[Any]], context: Any) -> list[Any]:
    """A command's parameters, with words for what a user has to give."""
    parameters = parameters_of(context)
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None  # its name says it
        elif parameter.is_flag:
            parameter.metavar = ""
        elif parameter.metavar is None:
            parameter.metavar = VALUES.get(parameter.bare_type().removeprefix("list[").removesuffix("]"))
        quicken(parameter)
        parameter._custom_shell_complete = completion_of(parameter) or parameter._custom_shell_complete
    return parameters
