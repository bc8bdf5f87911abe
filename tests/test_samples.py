"""What a batch is made of: the same with and without cache, in one process or several."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import load_base
from controlnet.model.training.cache import Cache
from controlnet.model.training.data import fingerprint, split
from controlnet.model.training.samples import Samples, caption_of
from controlnet.preprocessors.data.pairs import find_pairs
from controlnet.preprocessors.detectors.canny import canny
from controlnet.preprocessors.errors import InputError, OutputError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.metadata import dump
from controlnet.preprocessors.skeleton import cut_people, draw, mirror, to_text


def samples_of(data, config, cache=None, pairs=None):
    base = load_base(config.base)
    found = find_pairs(data)
    return Samples(pairs or list(found.pairs), config, base, model_hash(base.path), Cache(cache))


def tensors(batch):
    return [batch.z0, batch.eps, batch.t, batch.prompt.c_t, batch.condition]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_batches_are_the_same_with_and_without_cache(data, config, tmp_path):
    config = replace(config, crops=3, flip=True)
    plain, cached = samples_of(data, config), samples_of(data, config, tmp_path / "cache")
    cached.prepare(range(12))
    cached.base.unload()  # nothing is left to encode
    for k in (0, 3, 7):
        assert same(*plain.batch(k), *cached.batch(k))


def test_another_base_or_size_finds_nothing_in_the_cache(data, config, tmp_path):
    first = samples_of(data, config, tmp_path / "cache")
    first.prepare(range(12))
    for change in ("base", "size"):
        other = samples_of(data, config if change == "base" else replace(config, size=48), tmp_path / "cache")
        other.base_hash = "another" if change == "base" else other.base_hash
        before = set((tmp_path / "cache").rglob("*.npz"))
        other.moments(other.pairs[0], 0, False), other.text("x")
        assert len(set((tmp_path / "cache").rglob("*.npz")) - before) == 2
    before = set((tmp_path / "cache").rglob("*.npz"))
    (
        first.moments(first.pairs[0], 0, False),
        first.condition(first.pairs[0], 0, False),
        first.text(caption_of(first.pairs[0], False)),
    )
    assert set((tmp_path / "cache").rglob("*.npz")) == before


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_cache_entry_is_made_again_while_training(data, config, tmp_path, damage):
    """VAE and text encoder have been unloaded by then."""
    samples = samples_of(data, config, tmp_path / "cache")
    pair = samples.pairs[0]
    made = [
        lambda: samples.moments(pair, 0, False),
        lambda: samples.text("a"),
        lambda: samples.condition(pair, 0, False),
    ]
    expected = [make() for make in made]
    samples.base.unload()
    entries = list((tmp_path / "cache").rglob("*.npz"))
    for entry in entries:
        entry.write_bytes(damage(entry.read_bytes()))
    assert len(entries) == 3
    assert all(np.array_equal(make(), array) for make, array in zip(made, expected, strict=True))


def test_conditions_take_little_room(data, config, tmp_path):
    samples = samples_of(data, replace(config, size=256), tmp_path / "cache")
    samples.condition(samples.pairs[0], 0, False)
    (entry,) = (tmp_path / "cache/conditions").rglob("*.npz")
    assert entry.stat().st_size < 256 * 256 * 3 / 10


def test_a_condition_that_fits_another_picture_is_looked_at_again(data, config, tmp_path):
    """The cached condition of a picture that has since been replaced by one of another aspect is refused."""
    shutil.copytree(data, tmp_path / "d/images")
    shutil.copytree(data, tmp_path / "d/conditions")
    samples = samples_of(tmp_path / "d", replace(config, kind="depth"), tmp_path / "cache")
    samples.condition(samples.pairs[0], 0, False)
    write_file(samples.pairs[0].image, png_bytes(np.zeros((96, 96, 3), np.uint8)))
    with pytest.raises(InputError, match="96x72 for a picture of 96x96"):
        samples.condition(samples.pairs[0], 0, False)


def test_pictures_and_conditions_exchanged_are_others(data, config, tmp_path):
    """As when `source` and `target` were, and were put right: what was kept of the wrong pairs is not taken."""
    samples, pair = samples_of(data, replace(config, kind="depth"), tmp_path / "cache"), find_pairs(data).pairs
    one = replace(pair[0], condition=pair[1].image)
    other = replace(pair[1], condition=pair[0].image)
    assert not np.array_equal(samples.condition(one, 0, False), samples.condition(other, 0, False))


def test_all_captions_of_a_picture_are_held_out(data, config):
    """At most a quarter of the pictures, however many captions each has."""
    pairs, config = find_pairs(data), replace(config, held_out=16)
    many = replace(pairs, pairs=tuple(replace(p, caption=f"{p.caption} {i}") for p in pairs.pairs for i in range(5)))
    training, held_out = split(many, config)
    shown = {pair.image for pair in held_out}
    assert len(shown) == len(held_out) and shown.isdisjoint({pair.image for pair in training})
    assert len(shown) == 3 and len(training) == 5 * (len(pairs.pairs) - len(shown))


def test_a_full_cache_says_where_it_is(data, config, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(OutputError) as error:
        samples_of(data, config, tmp_path / "cache").text("x")
    assert "CONTROLNET_CACHE" in error.value.hint and "cache=false" in error.value.hint


def test_data_is_known_by_its_content_where_no_cache_can_be(data, tmp_path):
    known = fingerprint(find_pairs(data), Cache(None))
    assert known == fingerprint(find_pairs(data), Cache(tmp_path / "cache"))


def test_hashes_of_two_processes_are_both_remembered(data, tmp_path):
    first, second = Cache(tmp_path / "cache"), Cache(tmp_path / "cache")
    first.file_hash(data / "0.png"), second.file_hash(data / "1.png")
    first.remember(), second.remember()
    assert len(Cache(tmp_path / "cache")._known()) == 2


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_of_several_processes_are_the_batch_of_one(data, config, processes):
    samples = samples_of(data, replace(config, flip=True))
    for k in (0, 5):
        whole = tensors(*samples.batch(k))
        parts = [tensors(*samples.batch(k, i, processes)) for i in range(processes)]
        assert all(torch.equal(torch.cat(p), w) for w, *p in zip(whole, *parts, strict=True))


def test_an_epoch_sees_every_pair_once_and_the_next_one_in_another_order(data, config):
    samples = samples_of(data, replace(config, prompt_dropout=0.0))
    seen = [
        [t for k in range(3 * e, 3 * e + 3) for t in samples.batch(k)[0].prompt.c_t.sum((1, 2)).tolist()]
        for e in (0, 1)
    ]
    assert len(set(seen[0])) == 12 and sorted(seen[0]) == sorted(seen[1]) and seen[0] != seen[1]


def test_half_of_the_prompts_are_empty(data, config):
    samples = samples_of(data, config)
    empty = torch.from_numpy(samples.text("")).float()
    share = np.mean([(samples.batch(k)[0].prompt.c_t == empty).all((1, 2)).float().mean() for k in range(60)])
    assert 0.4 < share < 0.6


def test_picture_and_condition_are_cut_and_flipped_alike(data, config, tmp_path):
    """Condition = the picture itself: after every crop and flip it must still be."""
    shutil.copytree(data, tmp_path / "images")
    shutil.copytree(data, tmp_path / "conditions")
    config = replace(config, kind="depth", crops=4, flip=True)
    samples = samples_of(tmp_path, config)
    pictures = set()
    for crop in range(4):
        for flip in (False, True):
            picture, condition = (
                samples.picture(samples.pairs[2], crop, flip),
                samples.condition(samples.pairs[2], crop, flip),
            )
            assert picture.shape == (64, 64, 3) and np.abs(picture.astype(int) - condition).max() <= 12
            pictures.add(picture.tobytes())
    assert len(pictures) == 8
    told = {caption_of(samples.pairs[2], False), caption_of(samples.pairs[2], True)}
    assert told == {"a cube on the left, floor 10", "a cube on the right, floor 10"}  # 10.png sorts before 2.png


def test_poses_are_drawn_anew_for_crops_and_flips(data, config, tmp_path):
    """Joints follow the picture; under a flip the right hand is the left one's mirror, in its own colour."""
    rng = np.random.default_rng(0)
    person = np.column_stack([rng.uniform(0.4, 0.6, (18, 2)).round(3), np.ones(18)])
    for i in range(4):
        write_file(tmp_path / f"d/images/{i}.png", (data / f"{i}.png").read_bytes())
        text = dump({"kind": "pose", "keypoints": to_text([person])})
        write_file(tmp_path / f"d/conditions/{i}.png", png_bytes(draw([person], (96, 72)), text))
    samples = samples_of(tmp_path / "d", replace(config, kind="pose", flip=True, crops=2))
    pair = samples.pairs[0]
    square = cut_people([person], 1 / 8, 0, 3 / 4, 1)  # the centre square of 96x72
    assert np.array_equal(samples.condition(pair, 0, False), draw(square, (64, 64)))
    assert np.array_equal(samples.condition(pair, 0, True), draw(mirror(square), (64, 64)))
    assert not np.array_equal(samples.condition(pair, 0, True), samples.condition(pair, 0, False)[:, ::-1])
    closer = samples.condition(pair, 1, False)
    assert not np.array_equal(closer, samples.condition(pair, 0, False)) and closer.any()
    write_file(tmp_path / "d/conditions/2.png", png_bytes(draw([person], (96, 72))))
    with pytest.raises(UsageError, match=r"2\.png: a pose map without key points"):
        samples.condition(samples.pairs[2], 0, True)


def test_conditions_of_photos_are_what_detect_and_generate_make(data, config, tmp_path):
    from controlnet.model.sampling.canvas import to_canvas
    from controlnet.preprocessors.geometry import fit

    photo = np.kron(read_image((data / "0.png").read_bytes(), "")[0], np.ones((9, 9, 1), np.uint8))
    write_file(tmp_path / "0.png", png_bytes(photo))
    expected = to_canvas(np.repeat(canny(fit(photo, (512, 512)))[..., None], 3, 2), "canny", (64, 64))
    mine = (made := samples_of(tmp_path, config)).condition(made.pairs[0], 0, False)
    # Cut before it is scaled, or after: the rounding differs by a pixel of 512 at most.
    assert (mine != expected).mean() < 0.02 and 0.01 < (mine == 255).mean() < 0.5
