"""What all tests share: no network, a cache of their own, and small random models in diffusers' layout."""

import json
import signal
import socket

import numpy as np
import pytest
import torch
from controlnet.cli.main import main
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from helpers import ellipse, make_small_models, make_small_sdxl, pixels

_connect = socket.socket.connect


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Only loopback and local sockets may be reached."""

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach the network: {address}")
        return _connect(self, address)

    socket.socket.connect = connect
    yield
    socket.socket.connect = _connect


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell lets commands in the background ignore Ctrl-C, and `nohup` the end of a terminal, and so would the
    commands that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CONTROLNET_BASE", raising=False)


@pytest.fixture
def run(capsys):
    """`controlnet ARGS` in this process -> (exit code, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in args])
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def photo():
    """A photo-like picture (96, 128, 3) uint8: smooth colours, a disc and a bar."""
    y, x = np.mgrid[0:96, 0:128]
    image = np.stack([x * 2, y * 2, (x + y)], -1).clip(0, 255).astype(np.uint8)
    image[(x - 40) ** 2 + (y - 50) ** 2 < 500] = (250, 40, 30)
    image[20:30, 70:120] = (10, 10, 200)
    return image


@pytest.fixture(scope="session")
def small_base_folder(tmp_path_factory):
    """A base with random weights and a ControlNet (helpers.make_small_models) in the folders `base` and `net`."""
    return make_small_models(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A base of SDXL's family and a ControlNet (helpers.make_small_sdxl) in the folders `base` and `net`."""
    return make_small_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sdxl_pipeline(sdxl_folder):
    """diffusers' pipeline of both, in float64."""
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    net = ControlNetModel.from_pretrained(sdxl_folder / "net").double()
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(
        sdxl_folder / "base", controlnet=net, add_watermarker=False
    ).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve photos (72, 96) of boxes on colours, with captions that name a side. Not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for i in range(12):
        image = np.full((72, 96, 3), rng.integers(0, 120, 3), np.uint8)
        x, y = rng.integers(4, 60), rng.integers(4, 40)
        image[y : y + 24, x : x + 24] = rng.integers(150, 255, 3)
        write_file(folder / f"{i}.png", png_bytes(image))
        (folder / f"{i}.txt").write_text(f"a cube on the {'left' if x < 32 else 'right'}, floor {i}")
    return folder


@pytest.fixture
def config(small_base_folder):
    """Settings of a run of a second on the small base."""
    from controlnet.model.training.config import TrainConfig

    return TrainConfig(
        base=str(small_base_folder / "base"), kind="canny", max_steps=6, batch_size=4, learning_rate=1e-3,
        warmup_steps=0, log_every=1, validate_every=3, held_out=3, pictures=1, save_every=1e9,
    )  # fmt: skip


@pytest.fixture(scope="session")
def condition():
    """A map (64, 64, 3) of white points on black."""
    rng = np.random.default_rng(0)
    return np.repeat((rng.random((64, 64, 1)) < 0.1).astype(np.uint8) * 255, 3, 2)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three photos of 96 x 72."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        blocks = rng.integers(0, 255, (9, 12, 3), np.uint8)
        (tmp_path / f"photos/{i}.png").write_bytes(png_bytes(np.kron(blocks, np.ones((8, 8, 1), np.uint8))))
    return tmp_path


@pytest.fixture
def flags(small_base_folder):
    """Flags of `generate` for images of a moment."""
    return ["--base", small_base_folder / "base", "--dtype", "float32", "--steps", "5", "--seed", "1", "-q"]


@pytest.fixture
def masks(photos):
    """For the first photo: a mask, its negative, one of another size, and the photo with a hole."""
    from PIL import Image

    mask = ellipse(72, 96)
    large = ellipse(144, 192)
    for name, one in {
        "mask": mask,
        "negative": 255 - mask,
        "large": large,
        "black": 0 * mask,
        "white": 0 * mask + 255,
    }.items():
        (photos / f"{name}.png").write_bytes(png_bytes(one))
    photo = pixels("photos/0.png")[0]
    Image.fromarray(np.dstack([photo, 255 - mask])).save("hole.png")
    return mask > 127


@pytest.fixture
def jobs(small_base_folder, tmp_path, monkeypatch):
    """Eleven images in seven jobs: alike neighbours, other steps, several seeds; and a bad line."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(7):
        edges = (rng.random((64, 64)) < 0.1).astype(np.uint8) * 255
        (tmp_path / f"{i}.canny.png").write_bytes(png_bytes(edges))
        job = {"cond": f"{i}.canny.png,net={small_base_folder / 'net'}", "prompt": f"a cube {i}", "seed": 10 * i}
        lines.append(job | ({"num": 3} if i in (1, 4) else {}) | ({"steps": 3} if i == 5 else {}))
    lines.append({"nonsense": 1})
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--jobs", "jobs.jsonl", "--steps", 2, "--dtype", "float32", "-q", "-o"]
    return ["generate", "--base", small_base_folder / "base", *flags]
