"""Files inside tar files, by names of the form `data/000000.tar#0001.png`: indexed once, read without unpacking.

The tar file may lie behind a URL; then it is copied to this machine when its first file is read.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from controlnet.preprocessors.errors import InputError, reason
from controlnet.preprocessors.files import beside, is_file, not_written, scratch
from controlnet.preprocessors.remote import fetch, is_url, put

_NAME = re.compile(r"(.*?\.tar(?:\?[^#]*)?)#(.*)", re.DOTALL)
BLOCK = 512
"""Bytes of a tar file's blocks."""


def split(name: str) -> tuple[Path, str] | None:
    """The tar file, on this machine, and the member that a name means; None for the name of a file on disk. Raises
    InputError for a URL that cannot be read."""
    match = _NAME.fullmatch(name)
    return (kept_copy(match[1]), match[2]) if match else None


def member_of(name: str) -> str:
    """The part of a name behind its tar file; a name that means none as it is."""
    match = _NAME.fullmatch(name)
    return match[2] if match else name


def is_member(name: str) -> bool:
    """Whether a name means a file in a tar file, and that tar file is there."""
    match = _NAME.fullmatch(name)
    return match is not None and is_file(match[1])


@cache
def kept_copy(name: str) -> Path:
    """A tar file on this machine: itself, or for a URL a copy, which stays until this process ends."""
    return local_copy(name)


def local_copy(name: str) -> Path:
    """A tar file on this machine: itself, or for a URL a copy in a folder of its own, which is removed when this
    process ends at the latest. Raises InputError, for one that came in part with its last whole file."""
    if not is_url(name):
        return Path(name)
    from controlnet.preprocessors.weights import cache_folder  # here: it knows the files of weights

    path = scratch(cache_folder() / "stream") / Path(name.partition("?")[0]).name
    try:
        fetch(name, path)
    except InputError as error:
        raise InputError(f"{error}{_how_far(path)}", error.hint) from error
    return path


def _how_far(path: Path) -> str:
    """What is said of a tar file that came in part: the last file in it that is whole."""
    import tarfile  # here: other commands need not wait for it

    whole = ""
    with suppress(tarfile.TarError, OSError), tarfile.open(path) as tar:
        for member in tar:
            if member.offset_data + member.size <= path.stat().st_size:
                whole = member.name
    return f"; the last file that came whole: {whole or 'none'}"


def name_of(tar: Path, member: str) -> Path:
    """The name of a member."""
    return Path(f"{tar}#{member}")


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files into a tar file, here or behind a URL, whole or not at all. The same files give the same bytes.
    Raises OutputError."""
    if is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            write_tar(Path(folder, "whole.tar"), files)
            put(path, Path(folder, "whole.tar").read_bytes())
        return
    import tarfile  # here: other commands need not wait for it

    try:
        with beside(path) as temporary, tarfile.open(temporary, "w") as tar:
            for name, data in files:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    except OSError as error:
        raise not_written(path, error) from error


def members(tar: Path) -> list[str]:
    """The names of the files in a tar file, in their order. Raises InputError for one that cannot be read or is cut
    off."""
    return list(_index_of(tar))


def read_member(tar: Path, member: str) -> bytes:
    """Raises InputError naming what is wrong."""
    offset, size = _place(tar, member)
    try:
        with open(tar, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise InputError(f"{tar}: cannot be read ({error.strerror})") from error


def mark_of(tar: Path, member: str) -> list[int]:
    """Numbers that change when the member may have changed: size, the tar file's time of change, place."""
    offset, size = _place(tar, member)
    return [size, tar.stat().st_mtime_ns, offset]


def _place(tar: Path, member: str) -> tuple[int, int]:
    try:
        return _index_of(tar)[member]
    except KeyError:
        raise InputError(f"{tar}: holds no {member}", f"tar tf {tar}") from None


def _index_of(tar: Path) -> dict[str, tuple[int, int]]:
    try:
        stat = tar.stat()
    except OSError as error:
        raise InputError(f"{tar}: no such file", f"ls {tar.parent}") from error
    mark = stat.st_size, stat.st_mtime_ns
    known = _known.get(tar)
    if known is None or known[0] != mark:
        known = _known[tar] = mark, _index(tar, stat.st_size)
    return known[1]


_known: dict[Path, tuple[tuple[int, int], dict[str, tuple[int, int]]]] = {}


def forget(tar: Path) -> None:
    """Free the memory that the index of a tar file takes; it is made again when it is needed."""
    _known.pop(tar, None)


def _index(tar: Path, length: int) -> dict[str, tuple[int, int]]:
    """Name -> offset and size of each file in a tar file."""
    import tarfile

    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if member.isfile():
                    found[member.name] = member.offset_data, member.size
    except (tarfile.TarError, EOFError, OSError) as error:
        last = next(reversed(found), "none of its files")
        raise InputError(
            f"{tar}: not a whole tar file ({reason(error)}); the last that was read: {last}", "make or fetch it again"
        ) from error
    last, (offset, size) = next(reversed(found.items()), ("", (0, 0)))
    if offset + size + BLOCK > length:  # a whole one ends in blocks of zeros
        raise InputError(f"{tar}: is cut off after {last or 'its beginning'}", "make or fetch it again")
    return found
