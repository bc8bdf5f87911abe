"""Jobs out of files that are no text: Parquet with a column for each key, and tar files as WebDataset has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controlnet.model.work.batch import EXAMPLE, Line
from controlnet.preprocessors.data.forms import pictures_in, samples_in
from controlnet.preprocessors.data.rows import parquet_rows
from controlnet.preprocessors.data.stream import expand
from controlnet.preprocessors.errors import ControlNetError, InputError, UsageError
from controlnet.preprocessors.files import decoded
from controlnet.preprocessors.images import read_bytes
from controlnet.preprocessors.jsons import read_object
from controlnet.preprocessors.tars import kept_copy, read_member


def read(path: str) -> Iterator[Line]:
    """The jobs of a Parquet file, or of one or several tar files ({000..009}.tar). Raises InputError for a file that
    cannot be read."""
    if path.endswith(".parquet"):
        for number, row in enumerate(parquet_rows(path, read_bytes(path)), 1):
            yield f"{path} row {number}", {key: value for key, value in row.items() if value is not None}
        return
    some = False
    for tar in expand(path):
        for line in _jobs_in(tar, kept_copy(tar)):
            some = True
            yield line
    if not some:
        raise InputError(f"{path}: no jobs in it", "samples such as 0001.canny.png, 0001.txt, 0001.json")


def _jobs_in(name: str, tar: Path) -> Iterator[Line]:
    """A job for each sample of a tar file: its maps NAME.KIND.png, or else its picture, are the conditions, NAME.txt is
    the prompt, NAME.json has the other keys."""
    for key, files in samples_in(tar).items():
        where = f"{name}#{key.removeprefix('/')}"
        try:
            job: dict[str, Any] = {}
            if "json" in files:
                job |= read_object(read_member(tar, files["json"]), where, UsageError, EXAMPLE)
            if "txt" in files:
                job["prompt"] = decoded(read_member(tar, files["txt"]), where).strip()
            pictures = pictures_in(files)
            maps = [member for ending, member in pictures.items() if "." in ending] or list(pictures.values())
            job.setdefault("cond", [f"{name}#{member}" for member in maps])
            yield where, job
        except ControlNetError as error:
            yield where, error if isinstance(error, UsageError) else UsageError(str(error), error.hint)
