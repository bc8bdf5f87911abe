"""`make tiny-depth`: trains the embedded depth network on drawn rooms and scenes, and writes its weights.

    python -m controlnet.model.tiny.depth --minutes 60

Loss: the absolute error of -log distance after the picture's own median error is taken off (a camera cannot tell a
small room from a large one), and half of that of its gradients at four scales (as MiDaS, Ranftl et al. 2020, Eq. 11).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.files.tensors import write_tensors
from controlnet.model.tiny.stages import end_if_stopped
from controlnet.model.tiny.world.rooms import draw_rooms
from controlnet.model.tiny.world.shards import SHARD, world
from controlnet.model.training.loop import LoopConfig, Progress, fit
from controlnet.model.training.precision import attention_kernels, autocast
from controlnet.preprocessors.detectors.tiny_depth import Dense
from controlnet.preprocessors.files import beside
from controlnet.preprocessors.weights import SHIPPED
from controlnet.preprocessors.workers import workers
from torch import Tensor, nn

HELD_OUT = 10_000_000
_ROOMS_VERSION = 1


def draw_shard(path: Path, first: int, size: int) -> Path:
    """Draw SHARD rooms, from the seed `first` on, into one compressed file, unless it is there."""
    if not path.exists():
        drawn = [draw_rooms(list(range(i, i + 25)), size) for i in range(first, first + SHARD, 25)]
        images, depth = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        with beside(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, images=images.numpy(), depth=depth.clamp(max=100).half().numpy())
    return path


def rooms(folder: Path, count: int, size: int, first: int = 0, report=print) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, H, W, 3) uint8 and depth (N, H, W) float16 of `count` rooms, drawn if they are not in `folder`."""
    folder = folder / f"v{_ROOMS_VERSION}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(first, first + count, SHARD)
    with workers() as pool:
        jobs = [pool.submit(draw_shard, folder / f"{start:08d}.npz", start, size) for start in starts]
        shards = []
        for i, job in enumerate(jobs):
            with np.load(job.result()) as shard:
                shards.append((shard["images"], shard["depth"]))
            if i % 8 == 7 or i + 1 == len(jobs):
                report(f"rooms: {(i + 1) * SHARD} of {len(jobs) * SHARD}")
    images, depth = (np.concatenate(parts)[:count] for parts in zip(*shards, strict=True))
    return images, depth


def vary(image: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A part of the picture at full size, perhaps mirrored, in another exposure, sharpness and noise."""
    size = image.shape[0]
    if rng.random() < 0.7:
        high, wide = (int(size * rng.uniform(0.55, 1.0)) for _ in range(2))
        y, x = int(rng.integers(0, size - high + 1)), int(rng.integers(0, size - wide + 1))
        image = cv2.resize(image[y : y + high, x : x + wide], (size, size), interpolation=cv2.INTER_LINEAR)
        depth = cv2.resize(depth[y : y + high, x : x + wide], (size, size), interpolation=cv2.INTER_NEAREST)
    if rng.random() < 0.5:
        image, depth = image[:, ::-1], depth[:, ::-1]
    light = image.astype(np.float32) / 255
    if rng.random() < 0.7:  # as bright as photos are, or much darker or brighter
        light *= rng.uniform(0.25, 0.65) / max(float(light.mean()), 0.02)
    light = light.clip(0, 1) ** rng.uniform(0.6, 1.6) * rng.uniform(0.8, 1.2, 3).astype(np.float32)
    if rng.random() < 0.3:
        at = np.linspace(-1, 1, size, dtype=np.float32)
        light *= 1 - rng.uniform(0, 0.5) * (at[:, None] ** 2 + at[None] ** 2)[..., None] / 2
    if rng.random() < 0.2:
        light = np.repeat(light.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.5:
        light = cv2.GaussianBlur(light, (0, 0), rng.uniform(0.3, 1.2))
    light = light + rng.normal(0, rng.uniform(0, 0.05), light.shape)
    return light.clip(0, 1).astype(np.float32), depth


def loss_of_batch(predicted: Tensor, depth: Tensor) -> Tensor:
    """The loss of a batch. predicted (B, h, w): -log distance up to a constant; depth (B, h, w), metres."""
    error = predicted + depth.clamp(0.05, 50).log()
    error = error - error.flatten(1).median(1).values[:, None, None]
    total = error.abs().mean()
    for scale in range(4):
        small = F.avg_pool2d(error[:, None], 2**scale)
        total = total + 0.5 * sum(small.diff(dim=d).abs().mean() for d in (2, 3)) / 4 * 2**scale
    return total


def train(
    network: nn.Module,
    images: np.ndarray,
    depth: np.ndarray,
    folder: Path,
    minutes: float,
    device: torch.device,
    batch: int = 32,
    report=print,
) -> Progress:
    """Train `network` in place; leaves the averaged weights in it."""
    torch.manual_seed(0)
    network.to(device).to(memory_format=torch.channels_last)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([9, step])
        rows = rng.integers(len(images), size=batch)
        pairs = [vary(images[r], depth[r].astype(np.float32), rng) for r in rows]
        x = torch.from_numpy(np.stack([p[0] for p in pairs])).to(device).permute(0, 3, 1, 2)
        true = torch.from_numpy(np.stack([p[1] for p in pairs])).to(device)[:, ::2, ::2]
        with autocast(device):
            predicted = network(x)[:, 0]
        return loss_of_batch(predicted.float(), true)

    return fit(network, loss_of, LoopConfig(minutes=minutes, learning_rate=1e-3), folder, report)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rooms", type=int, default=12_000)
    parser.add_argument("--scenes", type=int, default=3_000, help="of the world, objects and people, besides")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="where checkpoints and drawn rooms go")
    parser.add_argument("--out", type=Path, default=SHIPPED / "tiny-depth", help="where the network goes")
    args = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, depth = rooms(args.runs / "rooms", args.rooms, args.size)
    if args.scenes:
        known = world(args.runs / "world", args.scenes, args.size, device=device.type)
        images, depth = np.concatenate([images, known.images]), np.concatenate([depth, known.depth])
    network = Dense()
    with attention_kernels(device):
        progress = train(network, images, depth, args.runs / "depth", args.minutes, device)
    end_if_stopped(args.runs / "depth")
    args.out.mkdir(parents=True, exist_ok=True)
    state = {name: value.to("cpu", torch.float16).contiguous() for name, value in network.state_dict().items()}
    write_tensors(args.out / "model.safetensors", state)
    print(f"written: {args.out} ({progress.step} steps, {progress.seconds / 60:.0f} minutes)")


if __name__ == "__main__":
    main()
