"""What all tests share: no network, a cache of their own, and small random models in diffusers' layout."""

import shutil
import socket

import numpy as np
import pytest
from controlnet.cli.main import main
from controlnet.preprocessors.images import png_bytes, write_file
from helpers import randomise, small_unet

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
    """A base with random weights: f8 AutoencoderKL, two-level UNet, CLIP text encoder of two layers; and a ControlNet
    with random zero convolutions in its folder `net`."""
    import torch
    from controlnet.model.checkpoint import save_controlnet
    from controlnet.model.controlnet import ControlNet
    from controlnet.model.tiny.recipe import make_tokenizer
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    tokenizer = make_tokenizer(["a red cube on a blue floor", "a person standing"] * 20, folder / "tokens")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), norm_num_groups=2, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = small_unet()
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text, tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        requires_safety_checker=False,
    ).save_pretrained(folder / "base")  # fmt: skip
    shutil.copy(folder / "tokens/words.txt", folder / "base/tokenizer")
    net = ControlNet.from_base(unet, hint_widths=(4, 4, 8, 8))
    save_controlnet(randomise(net), folder / "net")
    return folder


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
