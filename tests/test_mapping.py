"""Files mapped into memory: read when they are used, given back at any time; weights that are there only at work."""

import ctypes
import errno
import gc
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from controlnet.model.files import mapping
from controlnet.model.files.mapping import Mapping, Spare, forget
from controlnet.model.files.tensors import fill, read_tensors, write_tensors
from controlnet.model.load import load_base
from controlnet.model.nets import load_net
from controlnet.model.sampling.memory import takes_halves_apart
from controlnet.model.work import machine, studio
from controlnet.preprocessors.errors import ModelError, OutputError
from torch import nn

MEGABYTE = 2**20
AROUND = 2**17
"""Bytes that a kernel may map around what is read."""


def resident(tensor) -> int:
    """Bytes in memory of the mapping that a tensor is in."""
    here = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
        elif here and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no such mapping")


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


@linux
def test_what_is_forgotten_is_read_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 * MEGABYTE))
    mapped = Mapping.of_file(path)
    tensor = mapped.tensor(torch.uint8, (2, MEGABYTE), MEGABYTE)
    before = tensor.clone()
    assert bytes(before.flatten().numpy()) == path.read_bytes()[MEGABYTE : 3 * MEGABYTE]
    assert resident(tensor) >= 2 * MEGABYTE
    forget(tensor)
    assert resident(tensor) < MEGABYTE
    assert torch.equal(tensor, before)


def test_a_mapping_lives_as_long_as_its_tensors(tmp_path):
    (tmp_path / "file").write_bytes(b"12345678")
    tensor = Mapping.of_file(tmp_path / "file").tensor(torch.uint8, (8,), 0)
    gc.collect()
    assert tensor.tolist() == list(b"12345678")
    count = len(mapping._LIVE)
    del tensor
    gc.collect()
    assert len(mapping._LIVE) == count - 1


def test_memory_that_is_not_mapped_is_left_alone():
    tensor = torch.ones(MEGABYTE)
    forget(tensor)
    assert tensor.sum() == MEGABYTE


TYPES = ["float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"]


def test_tensors_are_read_as_they_were_written(tmp_path):
    tensors = {name: torch.arange(6).view(2, 3).to(getattr(torch, name)) for name in TYPES}
    tensors |= {"one": torch.tensor(3.0), "none": torch.empty(0, 4)}
    write_tensors(tmp_path / "file.safetensors", tensors, {"more": "text"})
    read = read_tensors(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].double(), tensor.double())
    assert read_tensors(tmp_path / "file.safetensors", ["one"]).keys() == {"one"}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(64, 512, 3, padding=1), nn.Linear(512, 1024)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))


@linux
@torch.no_grad()
def test_weights_are_in_memory_only_while_their_layer_works(tmp_path):
    torch.manual_seed(0)
    plain, spare = Layers(), Layers()
    write_tensors(tmp_path / "file.safetensors", plain.state_dict())
    for network, low in ((plain, False), (spare, True)):
        fill(network, read_tensors(tmp_path / "file.safetensors"), tmp_path, None, torch.float32, low_memory=low)
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    assert resident(spare.linear.weight) <= AROUND
    assert torch.equal(spare(x), plain(x))
    assert resident(spare.linear.weight) <= AROUND
    assert spare.conv.weight.is_contiguous(memory_format=torch.channels_last)

    # A change in place, as some adapters make one, is kept.
    for network in (plain, spare):
        network.linear.weight += 1
    forget(spare.linear.weight)
    assert torch.equal(spare(x), plain(x))


@linux
def test_low_memory_maps_the_networks_of_a_base(small_base_folder, monkeypatch):
    monkeypatch.setattr(mapping, "LARGE", 1000)
    spare = load_base(str(small_base_folder / "base"), low_memory=True)
    net = load_net(small_base_folder / "net", low_memory=True)
    plain = load_base(str(small_base_folder / "base"))
    pairs = [(spare.unet, plain.unet), (spare.vae, plain.vae), (spare.text_encoder, plain.text_encoder)]
    for low, normal in [*pairs, (net, load_net(small_base_folder / "net"))]:
        large = max(low.parameters(), key=torch.numel)
        assert resident(large) <= AROUND
        assert all(torch.equal(a, b) for a, b in zip(low.parameters(), normal.parameters(), strict=True))


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    state = Layers().state_dict()
    state["linear.weight"][3, 4] = torch.inf
    for low in (False, True):
        with pytest.raises(ModelError, match=r"linear\.weight holds NaN or infinite"):
            fill(Layers(), dict(state), tmp_path, None, torch.bfloat16, low_memory=low)


def test_a_full_disk_is_found_before_anything_is_written(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"--low-memory keeps 0\.0 GB .*No space left") as raised:
        Spare(Layers(), torch.float32)
    assert "CONTROLNET_CACHE" in raised.value.hint


def test_a_studio_keeps_freed_memory_unless_memory_is_scarce(monkeypatch):
    asked = []
    monkeypatch.setattr(studio, "keep_freed_memory", lambda: asked.append(True))
    studio.Studio("cpu")
    studio.Studio("cpu", low_memory=True)
    assert asked == [True]


def test_where_the_c_library_is_another_one_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    machine.keep_freed_memory()


def test_halves_are_computed_apart_where_they_need_more_than_the_decoder():
    def of(device, low_memory=True, engine="eager"):
        unet = SimpleNamespace(config=SimpleNamespace(block_out_channels=(320, 640, 1280, 1280)))
        vae = SimpleNamespace(config={"block_out_channels": (128, 256, 512, 512)})
        return SimpleNamespace(
            unet=unet, vae=vae, factor=8, low_memory=low_memory, device=torch.device(device),
            engine=SimpleNamespace(name=engine),
        )  # fmt: skip

    assert not takes_halves_apart(of("cpu"), (768, 768))
    assert takes_halves_apart(of("cpu"), (1536, 1536))
    assert takes_halves_apart(of("cuda"), (512, 512))  # the UNet's weights are on the device besides
    assert takes_halves_apart(of("cpu", engine="openvino"), (512, 512))
    assert not takes_halves_apart(of("cpu", low_memory=False), (1536, 1536))
