"""Reading a stream of a million small samples: memory over time and samples per second, beside the webdataset library.

make bench-stream        (2 GB of disk, ten minutes; SAMPLES=100000 for fewer)
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from controlnet.model.training.order import Lanes
from controlnet.preprocessors.data.stream import open_stream
from controlnet.preprocessors.tars import write_tar
from PIL import Image

SAMPLES = int(os.environ.get("SAMPLES", 1_000_000))
PER_TAR = 10_000
BATCH = 16


def make(folder: Path) -> None:
    """Tar files of pictures of 16 x 16 pixels, all different, each with a condition and a caption."""

    def files(first: int):
        for i in range(first, first + PER_TAR):
            picture = np.full((16, 16, 3), (i // 65536, i // 256 % 256, i % 256), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            yield f"{i:08d}.png", buffer.getvalue()
            yield f"{i:08d}.depth.png", buffer.getvalue()
            yield f"{i:08d}.txt", f"picture {i}".encode()

    for number in range(SAMPLES // PER_TAR):
        write_tar(folder / f"{number:06d}.tar", files(number * PER_TAR))


def ours(folder: Path):
    stream = open_stream(f"{folder}/*.tar")
    order = Lanes(stream, 0, BATCH)
    for k in range(SAMPLES // BATCH):
        for slot in range(BATCH):
            _, _, pair = order.at(k, slot)
            yield pair.picture(), pair.read_condition("depth").map, pair.caption


def theirs(folder: Path):
    import webdataset

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(PER_TAR).decode("rgb8")
    yield from data.to_tuple("png", "depth.png", "txt")


def main() -> None:
    if len(sys.argv) == 3:
        read = {"ours": ours, "webdataset": theirs}[sys.argv[1]]
        marks = {max(1, SAMPLES * part // 100) for part in (1, 10, 25, 50, 75, 100)}
        began = time.perf_counter()
        for seen, _ in enumerate(read(Path(sys.argv[2])), 1):
            if seen in marks:
                memory = psutil.Process().memory_info().rss / 2**20
                rate = seen / (time.perf_counter() - began)
                print(f"{sys.argv[1]:11}{seen:10,} samples  {memory:6.0f} MiB  {rate:8.0f} samples/s", flush=True)
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        for one in ("ours", "webdataset"):
            subprocess.run([sys.executable, __file__, one, name], check=True)


if __name__ == "__main__":
    main()
