"""User mistakes as one exception family, and the exit codes of the command line.

The message says what is wrong, which value, and what was expected; the hint says what to do next. Bugs are not in this
family and keep their traceback.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes; 0 to 2 are the shell's and Typer's conventions, ours start at 3."""

    OK = 0
    BUG = 1
    """An unexpected error in this program, with a traceback."""
    USAGE = 2
    """Wrong flags or values."""
    INPUT = 3
    """A file or photo that cannot be used."""
    OUTPUT = 4
    """A result that cannot be written, or exists already."""
    MODEL = 5
    """Weights or a model folder that cannot be used."""
    PARTIAL = 6
    """Some of several inputs failed; the others are done."""
    TRAINING = 7
    """Training stopped: the loss exploded, or memory ran out; the last checkpoint is kept."""
    NOTHING = 8
    """A detector found nothing in a photo, such as nobody for a pose; no map was made."""
    DIFFERENT = 9
    """An image made again differs from the original."""
    INTERRUPTED = 130
    PIPE = 141
    """The program that reads our standard output has ended; the shell's exit code for SIGPIPE."""


class ControlNetError(Exception):
    """Base of the family: a message, a hint (a command where possible) and an exit code."""

    code = Exit.USAGE

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


def reason(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UsageError(ControlNetError):
    code = Exit.USAGE


class InputError(ControlNetError):
    code = Exit.INPUT


class NothingFoundError(InputError):
    code = Exit.NOTHING


class OutputError(ControlNetError):
    code = Exit.OUTPUT


class ModelError(ControlNetError):
    code = Exit.MODEL


class TrainingError(ControlNetError):
    code = Exit.TRAINING
