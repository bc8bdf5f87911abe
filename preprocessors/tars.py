"""Files inside tar files, by names of the form `data/000000.tar#0001.png`: indexed once, read without unpacking."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

from controlnet.preprocessors.errors import InputError, reason
from controlnet.preprocessors.files import beside, is_file, not_written
from controlnet.preprocessors.remote import is_url, put

MARK = ".tar#"
BLOCK = 512
"""Bytes of a tar file's blocks."""


def split(name: str) -> tuple[Path, str] | None:
    """The tar file and the member that a name means; None for the name of a file on disk."""
    before, mark, member = name.partition(MARK)
    return (Path(before + mark[:-1]), member) if mark else None


def is_member(name: str) -> bool:
    """Whether a name means a file in a tar file, and that tar file is there."""
    inside = split(name)
    return inside is not None and is_file(inside[0])


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
