"""The command `controlnet`: its subcommands, and the one place where user mistakes are caught."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Annotated

import typer
from controlnet.cli import show, verbose
from controlnet.cli.complete import join_words
from controlnet.cli.help import examples, finish, named
from controlnet.cli.interrupts import insist_on_interrupts
from controlnet.preprocessors.errors import ControlNetError, Exit, UsageError
from controlnet.preprocessors.imports import share_cores, uncollected
from controlnet.preprocessors.log import LOG
from typer._click.exceptions import NoArgsIsHelpError
from typer._click.exceptions import UsageError as TyperUsageError
from typer.core import TyperGroup

COMMANDS = {
    "detect": ("detect:app", "Make condition maps from photos."),
    "generate": ("generate:generate", "Make images from condition maps and a prompt."),
    "train": ("train:train", "Train a ControlNet on photos or pairs, and be told whether it works."),
    "status": ("train:status", "Say how a training run stands: verdict, control gap, time left; draw its curve."),
    "score": (
        "score:score", "Measure how well images keep to their conditions: lines by F1, depth by rank, poses by OKS.",
    ),
    "report": ("report:report", "Show a training run, or a folder of results, as one page for the browser."),
    "replay": (
        "replay:replay",
        "Make an image again from its own PNG text; say whether it is identical, or how far off and why.",
    ),
    "check": ("check:check", "Say what is wrong with condition maps, and mend what can be."),
    "doctor": ("doctor:doctor", "Say what this machine has: versions, devices, memory, models; and what is missing."),
    "dataset": ("dataset:app", "Check training data, or build it from photos."),
    "models": ("models:app", "List, fetch, check, show and convert models and detectors' weights."),
}  # fmt: skip
"""Name -> (`module:attribute` in this package, help). Only the module of the command that is called is imported."""


class Commands(TyperGroup):
    """Builds a command when it is called."""

    def get_params(self, ctx):
        return named(super().get_params, ctx)

    def make_context(self, *args, **extra):
        with _as_ours():
            return super().make_context(*args, **extra)

    def invoke(self, ctx):
        with _as_ours():
            return super().invoke(ctx)

    def resolve_command(self, ctx, args):
        if args[0] not in COMMANDS:
            return super().resolve_command(ctx, args)
        with uncollected():
            return args[0], _command(args[0]), args[1:]


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    """What Typer finds wrong with a command's words is told as all other mistakes are."""
    try:
        yield
    except NoArgsIsHelpError:
        raise
    except TyperUsageError as error:
        text = error.format_message().rstrip(".")
        command = error.ctx.command_path if error.ctx else "controlnet"
        raise UsageError(text[:1].lower() + text[1:], f"{command} --help") from error


def _command(name: str):
    place, help_ = COMMANDS[name]
    module, attribute = place.split(":")
    found = getattr(importlib.import_module(f"controlnet.cli.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name, help=help_)(found)
        found = single
    return finish(typer.main.get_command(found), name)


app = typer.Typer(
    name="controlnet",
    help="Spatial control for text-to-image diffusion: photos become condition maps, maps and prompts become images.",
    cls=Commands,
    epilog=examples(""),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"controlnet {importlib.metadata.version('controlnet-toolkit')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; the exit codes are `controlnet.preprocessors.errors.Exit`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that nothing here uses
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)  # bytes in a file's name that are not text come out unchanged
    insist_on_interrupts()
    share_cores()
    join_words(os.environ)
    try:
        try:
            app(args, prog_name="controlnet")
        finally:
            show.close()
            sys.stdout.flush()  # here, where its errors can be reported, not when the interpreter ends
            if args is None and not _is_one_of_several():
                gc.freeze()  # the interpreter need not look for garbage when it ends, which can take a second
    except SystemExit as stop:
        if stop.code == Exit.INTERRUPTED and args is None and threading.active_count() > 1:
            os._exit(
                Exit.INTERRUPTED
            )  # the interpreter would wait for threads that compute; files are whole or not there
        if isinstance(stop.__context__, BrokenPipeError):  # Click's own exit code for it is 1, that of a bug
            _leave(Exit.PIPE)
        raise
    except ControlNetError as error:
        _tell(str(error), error.hint)
        sys.exit(error.code)
    except BrokenPipeError:
        _leave(Exit.PIPE)
    except OSError as error:
        # What the system refuses (a name too long, a folder that may not be read, a full disk) is not a bug of ours.
        if error.filename is None and error.errno not in _FULL:
            raise
        name = error.filename if isinstance(error.filename, str) else "standard output"
        full = error.errno in _FULL
        _tell(f"{name}: {error.strerror}", "free some disk, then the same command again" if full else "")
        _leave(Exit.OUTPUT if full or error.errno == errno.EROFS else Exit.INPUT)
    finally:
        verbose.close()


def _is_one_of_several() -> bool:
    """Whether torch's processes are connected: what connects them must be taken apart before the interpreter ends."""
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized()


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _tell(text: str, hint: str) -> None:
    for word, line in (("error", text), ("hint", hint)):
        if line:
            LOG.debug("%s: %s", word, line)
            print(f"{word}: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr)


def _leave(code: Exit) -> None:
    """Exit without trying again to write what standard output refused."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    main()
