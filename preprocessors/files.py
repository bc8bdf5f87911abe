"""Reads text files, whatever wrote them, and writes files whole or not at all: under a temporary name in the same
folder, then renamed.

A process that is killed leaves its temporary file behind. The next one that writes into that folder, on the same
machine, removes what belongs to processes that are gone.
"""

from __future__ import annotations

import atexit
import codecs
import errno
import itertools
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from controlnet.preprocessors.errors import InputError, OutputError
from controlnet.preprocessors.remote import is_there, is_url, put, put_new, read_url


def _space() -> int:
    """The space in which numbers of processes hold: containers may share a name and a folder, and none of these."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_SPACE = f"{_space():x}"
_NAME = re.compile(rf"\.{_HOST}-(\w+)-(\d+)-\d+\.tmp(?:\.\w+)?")
_OLD = 24 * 3600.0
"""Seconds after which what another container of this name left is taken for left behind."""
_numbers = itertools.count()
_swept: set[Path] = set()


def _temporary() -> str:
    """A name that no other process takes, as _NAME tells it."""
    return f".{_HOST}-{_SPACE}-{os.getpid()}-{next(_numbers)}.tmp"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder. It becomes `path` when the block ends well, replacing
    what is there, and is removed otherwise. The folder of `path` is made if it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    temporary = path.parent / _temporary()
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over another one: the old one moves aside first, to a name that `_sweep`
            # ignores.
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(path)
    finally:
        _remove(temporary)


def scratch(folder: Path) -> Path:
    """A new folder in `folder` for files of this process, which removes it when it ends; if it is killed, the next one
    that writes there does. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    path = folder / _temporary()
    path.mkdir()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def write_file(path: Path, data: bytes) -> None:
    """Write a file on this machine or behind a URL. Raises OutputError."""
    if is_url(path):
        put(path, data)
        return
    try:
        with beside(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise not_written(path, error) from error


def write_new(path: Path, data: bytes) -> bool:
    """Write a file unless there is one already; whether it was written. Of several processes that try, on one machine
    or on a shared disk, one succeeds. Raises OutputError."""
    if is_url(path):
        return put_new(path, data)
    temporary = path.parent / _temporary()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        temporary.write_bytes(data)
        os.link(temporary, path)  # fails if there is one, where a rename would replace it
    except FileExistsError as error:
        if not exists(path):  # a file stands where a folder should be
            raise not_written(path, error) from error
        return False
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def not_written(path: Path, error: OSError) -> OutputError:
    """The error for a file that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    hint = "free some disk, then the same command again" if full else "choose another place with -o DIR/"
    return OutputError(f"{path}: cannot be written ({error.strerror or error})", hint)


def is_file(path: Path | str) -> bool:
    """Whether a path or a URL is a file that this user may see. Path's own method raises if the name is too long for
    the system or a folder above may not be entered."""
    if is_url(path):
        return is_there(str(path), "is_file")
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_dir(path: Path | str) -> bool:
    """The same for a folder."""
    if is_url(path):
        return is_there(str(path), "is_dir")
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def exists(path: Path | str) -> bool:
    """Whether a path is a file or a folder that this user may see."""
    if is_url(path):
        return is_there(str(path), "exists")
    return is_file(path) or is_dir(path)


def whole_path(name: str) -> str:
    """One name for a file or folder however it was written; any other name, such as a hub id, as it is."""
    return name if name == "-" or is_url(name) or not exists(name) else str(Path(name).resolve())


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises InputError."""
    if is_url(path):
        return decoded(read_url(str(path)), str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", f"ls -l {quote(str(path))}") from error
    return decoded(data, str(path))


def decoded(data: bytes, name: str) -> str:
    """The text of a file in UTF-8. Raises InputError with the command that converts it to UTF-8."""
    marks = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    coding = next((coding for mark, coding in marks.items() if data.startswith(mark)), "latin1")
    try:
        if coding == "latin1":
            return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start}"
    else:
        at = "UTF-16, by its first two bytes"
    file = quote(name)
    raise InputError(f"{name}: not UTF-8 ({at})", f"iconv -f {coding} -t utf-8 {file} > t && mv t {file}")


def _sweep(folder: Path) -> None:
    """Remove, once per process, the temporary files in a folder whose processes are gone, or may be in another
    container and have been silent for a day."""
    if folder in _swept:
        return
    _swept.add(folder)
    with os.scandir(folder) as entries:
        left = [
            entry.name
            for entry in entries
            if (match := _NAME.fullmatch(entry.name)) and _is_left(entry, *match.groups())
        ]
    for name in left:
        _remove(folder / name)


def _is_left(entry: os.DirEntry, space: str, process: str) -> bool:
    if space == _SPACE:
        return _is_gone(int(process))
    try:
        return time.time() - entry.stat().st_mtime > _OLD
    except OSError:  # it is gone already
        return False


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
