"""Which files are videos, judged by their names. Imports nothing."""

from __future__ import annotations

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp")
WRITTEN = (".mp4", ".mov", ".mkv", ".avi")
"""Endings of video that is written."""


def is_clip(name: str) -> bool:
    return name.lower().endswith(ENDINGS)
