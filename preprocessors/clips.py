"""Video: frames read one after another, and maps written as one again. OpenCV reads; ffmpeg writes H.264 where it is
installed, OpenCV MPEG-4 where it is not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from controlnet.preprocessors.errors import InputError, OutputError, reason
from controlnet.preprocessors.files import beside, is_file, not_written

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp")
WRITTEN = (".mp4", ".mov", ".mkv", ".avi")
"""Endings of video that is written."""


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


def is_clip(name: str) -> bool:
    """Whether a source is a video, judged by its name."""
    return name.lower().endswith(ENDINGS)


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
    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise InputError(f"{path}: is no video that can be read here", f"ffprobe {path}")
    return video


@contextmanager
def written(path: Path, size: tuple[int, int], rate: float) -> Iterator[Any]:
    """A function that takes frames (H, W, 3) uint8 RGB of `size` (width, height), in turn; the video is whole when the
    block ends well, and not there otherwise. Raises OutputError."""
    try:
        with beside(path) as temporary:
            place = temporary.with_suffix(path.suffix)
            write = _by_ffmpeg if shutil.which("ffmpeg") else _by_opencv
            try:
                with write(place, size, rate) as add:
                    yield add
                place.replace(temporary)
            finally:
                place.unlink(missing_ok=True)
    except OSError as error:
        raise not_written(path, error) from error


@contextmanager
def _by_ffmpeg(path: Path, size: tuple[int, int], rate: float) -> Iterator[Any]:
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{rate:g}", "-i", "-"]
    out = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "12", "-movflags", "+faststart"]
    command = ["ffmpeg", "-loglevel", "error", "-y", *form, *out, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    try:
        yield lambda frame: process.stdin.write(np.ascontiguousarray(frame).tobytes())
        process.stdin.close()
        if process.wait():
            raise OutputError(f"{path.name}: ffmpeg cannot write it ({process.stderr.read().decode()[-200:].strip()})")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextmanager
def _by_opencv(path: Path, size: tuple[int, int], rate: float) -> Iterator[Any]:
    code = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix.lower() == ".avi" else "mp4v"))  # type: ignore[attr-defined]
    try:
        video = cv2.VideoWriter(str(path), code, rate, size)
    except cv2.error as error:
        raise OutputError(f"{path.name}: OpenCV cannot write it ({reason(error)})") from error
    if not video.isOpened():
        raise OutputError(f"{path.name}: OpenCV cannot write such a video", "-o maps.mp4")
    try:
        yield lambda frame: video.write(np.ascontiguousarray(frame[..., ::-1]))
    finally:
        video.release()
