"""Canvases sampled in tiles that overlap."""

import json

import numpy as np
import pytest
import torch
from controlnet.model.control.strength import Strength
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.sampling.loop import ActiveNet
from controlnet.model.sampling.memory import check_memory
from controlnet.model.sampling.tiles import InTiles, Tile, tiles_of, weights_of
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.images import png_bytes, read_image
from hypothesis import given
from hypothesis import strategies as st

RNG = np.random.default_rng(0)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 32))
def test_tiles_cover_the_canvas_and_overlap(height, width, side):
    tiles = tiles_of((height, width), side)
    counted = torch.zeros(height, width)
    for tile in tiles:
        assert 0 < tile.height <= side and tile.top + tile.height <= height and tile.left + tile.width <= width
        tile.of(counted).add_(weights_of(tile))
    assert (counted > 0).all()
    tops = sorted({tile.top for tile in tiles})
    assert all(b - a <= side * 0.625 + 1 for a, b in zip(tops, tops[1:], strict=False))


class Pointwise:
    """Stands for an evaluation of a network that sees no further than a cell."""

    def under(self, controls):
        return lambda z, i: z * 2 + i


def test_what_does_not_depend_on_its_surroundings_has_no_seams():
    z = torch.randn(2, 4, 37, 50, dtype=torch.float64)
    made = InTiles(Pointwise(), tiles_of((37, 50), 16), lambda tile: [])(z, 3)
    assert torch.allclose(made, z * 2 + 3, atol=1e-12)


@pytest.fixture(scope="module")
def models(small_base_folder):
    base = load_base(str(small_base_folder / "base"), dtype=torch.float64)
    return base, load_controlnet(small_base_folder / "net", torch.float64)


def test_an_evaluation_in_tiles_is_the_blend_of_whole_ones(models):
    """Each tile's prediction, under its own part of the condition and of the region, computed by itself."""
    base, net = models
    condition, region = RNG.integers(0, 255, (128, 64, 3), np.uint8), RNG.random((128, 64)).astype(np.float32)
    request = Request("a red cube", 1, (condition,))
    strength = Strength(0.7, region=region)
    seen = []

    def spied(evaluation, grid, controls_of):
        def call(z, i):
            out = InTiles(evaluation, grid, controls_of)(z, i)
            if i == 0:
                parts = []
                for tile in grid:
                    (one,) = controls_of(tile)
                    part = condition[tile.top * 8 : (tile.top + tile.height) * 8]
                    hint = torch.from_numpy(part.copy()).permute(2, 0, 1)[None].double() / 255
                    own = Strength(0.7, region=region[tile.top * 8 : (tile.top + tile.height) * 8])
                    alone = evaluation.under([ActiveNet(net, net.prepare(hint), own)])
                    parts.append(alone(tile.of(z), 0))
                    assert np.array_equal(one.strength.region, own.region)
                seen.append((grid, parts, out))
            return out

        return call

    import controlnet.model.sampling.tiles as module

    original, module.InTiles = module.InTiles, spied
    try:
        (image,) = generate(base, [request], [(net, strength)], (64, 128), steps=2, tile=64)
    finally:
        module.InTiles = original
    grid, parts, out = seen[0]
    assert image.shape == (128, 64, 3) and len(grid) == 3
    total, counted = torch.zeros_like(out), torch.zeros(16, 8)
    for tile, part in zip(grid, parts, strict=True):
        weights = weights_of(tile)
        total[:, :, tile.top : tile.top + 8] += weights * part
        counted[tile.top : tile.top + 8] += weights
    assert torch.allclose(out, total / counted, atol=1e-5)


def test_a_canvas_of_one_tile_is_as_without_tiles(models):
    base, net = models
    request = Request("a red cube", 1, (RNG.integers(0, 255, (64, 64, 3), np.uint8),))
    made = [next(generate(base, [request], [(net, Strength())], (64, 64), 3, tile=tile)) for tile in (None, 64, 128)]
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


def test_sampling_in_tiles_of_sdxl(sdxl_folder):
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float32)
    images = list(generate(base, [Request("x", 1), Request("x", 2)], size=(96, 128), steps=2, tile=64))
    assert [image.shape for image in images] == [(128, 96, 3)] * 2 and images[0].std() > 1


def test_the_memory_of_tiles_is_that_of_one(models, monkeypatch):
    base, _ = models
    monkeypatch.setattr("controlnet.model.sampling.memory.free_memory", lambda device: 3e7)
    with pytest.raises(UsageError) as error:
        check_memory(base, (4096, 4096), False)
    assert "--tiles" in error.value.hint
    check_memory(base, (4096, 4096), False, tile=64)


def test_hires_and_large_photos_in_tiles(run, small_base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(png_bytes(RNG.integers(0, 255, (150, 202, 3), np.uint8)))
    (tmp_path / "a.canny.png").write_bytes(png_bytes((RNG.random((64, 64)) < 0.1).astype(np.uint8) * 255))
    common = ["generate", "--base", small_base_folder / "base", "--steps", 2, "--seed", 1, "-p", "x", "--tiles"]
    cond = ["--cond", f"a.canny.png,net={small_base_folder}/net"]
    for name, more, size in (
        ("hires", [*cond, "--hires", "2x"], (128, 128)),
        ("init", ["--init", "photo.png", "--strength", 0.5], (152, 200)),
        ("sized", ["--init", "photo.png", "--size", "128x96", "--strength", 1], (96, 128)),
    ):
        code, _, err = run(*common, *more, "-o", f"{name}.png")
        assert code == 0, err
        made, text = read_image((tmp_path / f"{name}.png").read_bytes(), name)
        assert made.shape[:2] == size and json.loads(text["controlnet"])["tiles"]
        code, out, err = run("replay", f"{name}.png")
        assert out.strip() == "identical", err
    # The first pass of --hires is whole: the same as without tiles.
    whole = [str(one) for one in common if one != "--tiles"]
    assert run(*whole, *cond, "--hires", "2x", "-o", "whole.png")[0] == 0
    a, b = (read_image((tmp_path / f"{name}.png").read_bytes(), name)[0].astype(int) for name in ("hires", "whole"))
    assert 0 < np.abs(a - b).mean() < 40


def test_a_tile_is_its_part_of_both():
    tile, picture = Tile(2, 3, 4, 5), RNG.integers(0, 255, (80, 96, 3), np.uint8)
    assert np.array_equal(tile.of_pixels(picture, 8), picture[16:48, 24:64])
    assert tile.of(torch.zeros(1, 4, 10, 12)).shape == (1, 4, 4, 5)
