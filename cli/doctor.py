"""`controlnet doctor`: versions, devices, memory, caches, what is here and what is missing, on one screen."""

from __future__ import annotations

import textwrap

from controlnet.cli.options import Json
from controlnet.model.work.machine import silence_libraries
from controlnet.preprocessors.jsons import dumps


def doctor(as_json: Json = False) -> None:
    silence_libraries()
    from controlnet.model.work.doctor import examine  # torch
    from rich.console import Console

    section, console = "", Console(soft_wrap=False, highlight=False)
    for one in examine():
        if as_json:
            print(dumps(vars(one)))
            continue
        if one.section != section:
            section = one.section
            console.print(section, style="bold", markup=False)
        width = max(20, console.width - 26)
        lines = textwrap.wrap(one.how, width) or [""]
        what = one.what if len(one.what) <= 22 else f"{one.what}\n{'':24}"
        console.print(f"  {what:22}  {lines[0]}", markup=False)
        for line in lines[1:]:
            console.print(f"{'':26}{line}", markup=False)
        if one.fix:
            console.print(f"{'':26}{one.fix}", style="yellow", markup=False)
