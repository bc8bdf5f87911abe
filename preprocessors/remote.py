"""Files by URL (s3://, gs://, hf://, https://, memory://, ...), read and written by fsspec and its clients.

Their paths are those of universal_pathlib, which answer as pathlib's do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from controlnet.preprocessors.errors import ControlNetError, InputError, OutputError, UsageError, reason

T = TypeVar("T")
TRIES = 4
"""How often something is asked for over a network, with a growing pause between two tries."""
CHUNK = 1 << 22
CREDENTIALS = "credentials as its client finds them, such as AWS_ACCESS_KEY_ID; see fsspec's documentation"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_CLIENTS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
}


def is_url(name: object) -> bool:
    """Whether a name is a URL; `file://` is one too."""
    return bool(_URL.match(str(name)))


def place(name: str) -> Path:
    """The path of a name: pathlib's, or for a URL one that answers alike. Raises UsageError if the package that reads
    such URLs is missing."""
    if not is_url(name):
        return Path(name)
    try:
        from upath import UPath

        path = UPath(name)
        path.fs  # noqa: B018 - here a missing client shows itself
        return path  # type: ignore[return-value]
    except ImportError as error:
        raise UsageError(f"{name}: {reason(error)}", f"pip install {_client(name)}") from None
    except ValueError as error:
        raise UsageError(
            f"{name}: {reason(error)}", "s3://, gs://, hf://, https://, or a path on this machine"
        ) from None
    except Exception as error:  # each client has its own types, for credentials that are missing for instance
        raise InputError(f"{name}: {reason(error)}", CREDENTIALS) from error


def _client(name: str) -> str:
    try:
        import upath  # noqa: F401
    except ImportError:
        return "'controlnet-toolkit[urls]'"
    scheme = name.partition("://")[0].lower()
    return _CLIENTS.get(scheme, "'controlnet-toolkit[urls]'")


def is_there(name: str, question: str) -> bool:
    """Whether there is an `is_file`, an `is_dir` or anything that `exists` behind a URL. Raises InputError if its
    server cannot be asked, UsageError if a package is missing."""
    path = place(name)
    return bool(_tried(name, getattr(path, question)))


def read_url(name: str) -> bytes:
    """The bytes behind a URL, asked for several times. Raises InputError."""
    path = place(name)
    return _tried(name, path.read_bytes)


def fetch(name: str, to: Path) -> None:
    """Copy a large file to this machine. Raises InputError, after which the part that came is in `to`, and OutputError
    when the disk is full."""
    path = place(name)

    def copy() -> None:
        with path.open("rb") as file, open(to, "wb") as copied:
            while data := file.read(CHUNK):
                try:
                    copied.write(data)
                    copied.flush()
                except OSError as error:  # the disk here is at fault, and asking again does not help
                    raise OutputError(f"{to}: cannot be written ({error.strerror})", "free some disk") from error

    _tried(name, copy)


def put(path: Path, data: bytes) -> None:
    """Write a file behind a URL. Object stores show it whole or not at all. Raises OutputError."""
    try:
        _tried(str(path), lambda: path.write_bytes(data), OutputError)
    except NotImplementedError as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)})", "s3://, gs://, hf://, or a folder") from error


def put_new(path: Path, data: bytes) -> bool:
    """Write a file unless there is one; whether it was written. Clients that can do so see to it that one of several
    writers succeeds."""
    if path.exists():
        return False
    try:
        path.fs.pipe_file(path.path, data, mode="create")  # type: ignore[attr-defined]
    except FileExistsError:
        return False
    except (TypeError, ValueError, NotImplementedError):  # clients that know no such mode
        put(path, data)
    return True


def _is_out_of_reach(error: Exception) -> bool:
    """Whether fsspec says of a server that does not answer that there is no such file."""
    cause = error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)


def _is_refused(error: Exception) -> bool:
    """Whether a server wants other credentials, or a client has none."""
    denied = isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)
    return denied or "redential" in type(error).__name__


def _tried(name: str, act: Callable[[], T], kind: type[ControlNetError] = InputError) -> T:
    """What `act` returns, with several tries where the network may be at fault."""
    for number in range(1, TRIES + 1):
        try:
            return act()
        except NotImplementedError:
            raise
        except ControlNetError:
            raise
        except Exception as error:  # each client has its own types
            why = reason(error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error)
            if isinstance(error, (FileNotFoundError, IsADirectoryError)) and not _is_out_of_reach(error):
                more = f" ({why})" if error.__cause__ else ""
                raise kind(f"{name}: no such file{more}", "look at the URL; a folder ends in /") from error
            if _is_refused(error):
                raise kind(f"{name}: {why}", CREDENTIALS) from error
            if number == TRIES:
                raise kind(f"{name}: {why}, asked {TRIES} times", "the same command again") from error
            time.sleep(0.2 * 4**number)
    raise AssertionError
