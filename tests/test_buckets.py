"""Batches of pictures at their own aspects: canvases of one size each."""

from dataclasses import replace

import numpy as np
import torch
from controlnet.model.load import load_base
from controlnet.model.training.cache import Cache
from controlnet.model.training.order import Bucketed, bucket_of
from controlnet.model.training.run import train
from controlnet.model.training.samples import Samples
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.data.stream import open_stream
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.tars import write_tar
from helpers import losses
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")


@given(width=st.integers(8, 4000), height=st.integers(8, 4000), size=st.sampled_from([512, 768, 1024]))
def test_buckets(width, height, size):
    w, h = bucket_of((width, height), size)
    assert w % 64 == h % 64 == 0 and w * h <= size * size and max(w, h) <= 2 * size
    assert bucket_of((height, width), size) == (h, w)
    if 0.5 <= width / height <= 2:
        assert abs(np.log(w / h / (width / height))) < 0.15


def test_a_size_smaller_than_a_step_is_square():
    assert bucket_of((100, 50), 8) == (8, 8)


def test_batches_of_one_size_each():
    pairs, sizes = list(range(20)), [(64, 64)] * 9 + [(96, 48)] * 10 + [(48, 96)]
    order = Bucketed(pairs, sizes, 0, 4)
    assert order.batches == 3 + 3 + 1
    for epoch in (0, 1):
        taken = [[order.at(k + 7 * epoch, slot)[1] for slot in range(4)] for k in range(7)]
        assert all(len({sizes[i] for i in batch}) == 1 for batch in taken)
        assert {i for batch in taken for i in batch} == set(range(20))


def test_pictures_of_several_aspects_train_at_their_own(config, tmp_path):
    """Tall, wide and square ones, in one run; the condition is the picture itself."""
    rng = np.random.default_rng(0)
    for i in range(12):
        height, width = ((60, 120), (120, 60), (90, 90))[i % 3]
        picture = np.repeat(np.repeat(rng.integers(0, 255, (height // 6, width // 6, 3), np.uint8), 6, 0), 6, 1)
        for name in ("images", "conditions"):
            write_file(tmp_path / f"data/{name}/{i}.png", png_bytes(picture))
    config = replace(config, kind="depth", buckets=True, flip=True, crops=2, batch_size=2)
    base = load_base(config.base)
    samples = Samples(find_pairs(tmp_path / "data").pairs, config, base, "x", Cache(tmp_path / "cache"), bucketed=True)
    seen = set()
    for k in range(12):
        (batch,) = samples.batch(k)
        height, width = batch.condition.shape[2:]
        assert batch.z0.shape[2:] == (height // 8, width // 8)
        seen.add((width, height))
    assert {w / h > 1 for w, h in seen if w != h} == {True, False} and (64, 64) in seen
    wide = next(pair for pair in samples.pairs if read_image(pair.read(pair.image), "")[0].shape[1] == 120)
    picture, condition = samples.picture(wide, 1, True), samples.condition(wide, 1, True)
    assert picture.shape[1] > picture.shape[0] and np.abs(picture.astype(int) - condition).mean() < 6
    progress = train(find_pairs(tmp_path / "data"), config, tmp_path / "run", CPU)
    assert progress.step == 6 and np.isfinite(progress.loss)


def test_a_stream_of_several_aspects(config, tmp_path):
    """Its batches come in parts of one size each."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(8):
        picture = png_bytes(rng.integers(0, 255, ((64, 128), (128, 64))[i % 2] + (3,), np.uint8))
        files += [(f"{i}.png", picture), (f"{i}.depth.png", picture), (f"{i}.txt", b"noise")]
    write_tar(tmp_path / "0.tar", files)
    config = replace(config, kind="depth", buckets=True, cache=False, held_out=2)
    train(open_stream(f"{tmp_path}/0.tar"), config, tmp_path / "run", CPU)
    assert len(losses(tmp_path / "run")) == 6
