"""Video: frames read one after another, and maps written as one again. OpenCV reads; ffmpeg writes H.264 where it is
installed, OpenCV MPEG-4 where it is not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import cv2
import numpy as np
from controlnet.preprocessors.errors import InputError, OutputError, reason
from controlnet.preprocessors.files import beside, is_file, not_written


@dataclass(frozen=True)
class Clip:
    """A video file."""

    path: str
    size: tuple[int, int]
    """(width, height) of its frames."""
    rate: float
    """Frames a second."""
    count: int
    """How many frames its header promises; 0 if it does not say."""

    def frames(self, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """(number, (H, W, 3) uint8 RGB) of every so many frames, from number 0 on. One is in memory at a time."""
        video = _opened(self.path)
        try:
            number = 0
            while video.grab():
                if number % every == 0:
                    there, frame = video.retrieve()
                    if not there:
                        break
                    yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                number += 1
        finally:
            video.release()


def open_clip(path: str) -> Clip:
    """A video file. Raises InputError for one that is missing, is none, or holds no frames."""
    if not is_file(path):
        raise InputError(f"{path}: no such file", f"ls {Path(path).parent}")
    video = _opened(path)
    try:
        there, frame = video.read()
        if not there or frame is None:
            raise InputError(f"{path}: holds no frames that can be read", f"ffprobe {path}")
        rate, count = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        video.release()
    size = (frame.shape[1], frame.shape[0])
    return Clip(path, size, rate if 0 < rate < 1000 else 25.0, max(0, int(count)))


def _opened(path: str) -> Any:
    try:
        path.encode()
    except UnicodeEncodeError as error:  # OpenCV crashes
        raise InputError(f"{path}: its name is not UTF-8, which OpenCV needs of a video", "rename it") from error
    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise InputError(f"{path}: is no video that can be read here", f"ffprobe {path}")
    return video


@contextmanager
def written(path: Path, size: tuple[int, int], rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes frames (H, W, 3) uint8 RGB of `size` (width, height), in turn; the video is whole when the
    block ends well, and not there otherwise. Raises OutputError."""
    added = 0
    with _errors_of(path), beside(path) as temporary:
        place = temporary.with_name(f"{temporary.name}{path.suffix.lower()}")  # whoever writes it goes by the ending
        write = _by_ffmpeg if shutil.which("ffmpeg") else _by_opencv
        try:
            with write(place, size, rate) as add:

                def counted(frame: np.ndarray) -> None:
                    nonlocal added
                    added += 1
                    add(np.ascontiguousarray(frame))

                yield counted
            if (whole := _count(place)) < added:  # OpenCV does not say when the disk is full
                raise OutputError(f"{path}: {whole} of {added} frames could be written", "free some disk, then again")
            place.replace(temporary)
        finally:
            place.unlink(missing_ok=True)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error
    except _Refused as error:
        raise OutputError(f"{path}: cannot be written ({error})", "-o maps.mp4, or a folder: -o maps/") from error


class _Refused(Exception):
    """What a program that writes videos says."""


def _count(path: Path) -> int:
    """How many frames of a video can be read."""
    video = cv2.VideoCapture(str(path))
    count = 0
    while video.grab():
        count += 1
    video.release()
    return count


@contextmanager
def _by_ffmpeg(path: Path, size: tuple[int, int], rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{rate:g}", "-i", "-"]
    out = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "12", "-movflags", "+faststart"]
    command = ["ffmpeg", "-loglevel", "error", "-y", *form, *out, str(path)]
    with TemporaryFile() as told:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told)
        given = process.stdin
        assert given is not None

        def said() -> _Refused:
            process.wait()
            told.seek(0)
            lines = told.read().decode(errors="replace").strip().splitlines()
            return _Refused(f"ffmpeg: {lines[-1]}" if lines else f"ffmpeg ends with {process.returncode}")

        def add(frame: np.ndarray) -> None:
            try:
                given.write(frame.tobytes())
            except BrokenPipeError:
                raise said() from None

        try:
            yield add
            with suppress(BrokenPipeError):
                given.close()
            if process.wait():
                raise said()
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                given.close()


@contextmanager
def _by_opencv(path: Path, size: tuple[int, int], rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    code = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))  # type: ignore[attr-defined]
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        video = cv2.VideoWriter(str(path), code, max(1.0, rate), size)
        if not video.isOpened():
            raise _Refused("by OpenCV; ffmpeg is not installed")
        try:
            yield lambda frame: video.write(frame[..., ::-1])
        finally:
            video.release()
    except cv2.error as error:
        raise _Refused(f"OpenCV: {reason(error)}") from error
    finally:
        cv2.utils.logging.setLogLevel(level)
