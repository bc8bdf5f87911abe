"""Bad files and flags by the hundred, made from good ones: each is a name and a function that writes what it needs
into a folder and gives the arguments of `controlnet`. The same every time.

A good thing is spoilt in every way of a list: text cut off, turned over or nested without end; in JSON each value
replaced by each of VALUES; in bytes some flipped. What such a file does is to be told, never a traceback.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DEEP = "[" * 20_000 + "]" * 20_000
VALUES: tuple[Any, ...] = (None, -1, 10**30, 1e308, "x", "", [], {}, [[]], {"a": 5}, True, "\ud800", [None] * 3)


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Path], list[str]]


class Models:
    """Where the good models are."""

    def __init__(self, folder: Path):
        self.base, self.net = folder / "base", folder / "net"

    def generate(self, cond: str, *more: str) -> list[str]:
        net = "" if ",net=" in cond else f",net={self.net}"
        return ["generate", "--base", str(self.base), "--cond", f"{cond}{net}", "-p", "x", "--steps", "1", "--seed",
                "1", "-q", *more]  # fmt: skip


def cases(models: Models) -> Iterator[Case]:
    yield from pictures()
    yield from png_texts(models)
    yield from records(models)
    yield from jobs(models)
    yield from data_sets()
    yield from key_points()
    yield from weight_files(models)
    yield from configs(models)
    yield from flags(models)


def photo() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:96]
    image = np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8)
    image[20:40, 30:60] = (250, 40, 30)
    return image


def encoded(form: str, image: np.ndarray | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo() if image is None else image).save(buffer, form, **options)
    return buffer.getvalue()


def with_text(image: np.ndarray, text: str) -> bytes:
    """A PNG with text in our chunk, written as bytes where it is no text that Pillow takes."""
    info = PngInfo()
    info.add_itxt("controlnet", text.encode("utf-8", "replace").decode())
    return encoded("PNG", image, pnginfo=info)


def lines() -> np.ndarray:
    image = np.zeros((64, 64, 3), np.uint8)
    image[20] = image[:, 30] = 255
    return image


def spoilt(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Bytes cut off, flipped, doubled, filled up."""
    rng = random.Random(len(data))
    for part in (0, 1, 7, 33, len(data) // 3, len(data) // 2, len(data) - 1):
        yield f"cut at {part}", data[:part]
    for seed in range(4):
        flipped = bytearray(data)
        for _ in range(5):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield f"flipped {seed}", bytes(flipped)
    yield "zeros", bytes(len(data))
    yield "doubled", data + data


def spoilt_json(good: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Texts: no JSON, JSON of another shape, and the good one with each of its values replaced or left out."""
    text = json.dumps(good)
    bad = {
        "empty": "", "cut": text[: len(text) // 2], "deep": DEEP, "null": "null", "list": "[]", "number": "5",
        "NaN": "NaN", "twice": text + text,
    }  # fmt: skip
    yield from bad.items()
    for key in good:
        yield f"{key} left out", json.dumps({k: v for k, v in good.items() if k != key})
        for value in VALUES:
            yield f"{key} {str(value)[:8]!a}", json.dumps(good | {key: value})


def some(rows: Iterator[tuple[str, Any]], count: int) -> list[tuple[str, Any]]:
    """So many of them, spread evenly."""
    found = list(rows)
    step = max(1, len(found) // count)
    return found[::step][:count]


def pictures() -> Iterator[Case]:
    files = {
        "png": encoded("PNG"), "jpg": encoded("JPEG"), "webp": encoded("WEBP"), "gif": encoded("GIF"),
        "bmp": encoded("BMP"), "tif": encoded("TIFF"), "avif": encoded("AVIF"),
    }  # fmt: skip
    for ending, good in files.items():
        for name, data in spoilt(good):
            yield _one_file(f"photo.{ending} {name}", f"photo.{ending}", data, "detect", "canny")
    header = bytearray(files["png"])
    header[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    odd = {
        "bomb.png": bytes(header), "text.png": b"no picture at all", "page.png": b"%PDF-1.7\n", "heic.heic":
        b"\0\0\0\x18ftypheic" + bytes(40), "script.svg": b"<svg/>", "dot.png": encoded("PNG", photo()[:1, :1]),
        "line.png": encoded("PNG", photo()[:3]),
    }  # fmt: skip
    for name, data in odd.items():
        yield _one_file(name, name, data, "detect", "canny")
        yield _one_file(f"{name} as lines", name, data, "detect", "lineart", "--resize", "keep")

    def folder(at: Path) -> list[str]:
        (at / "photo.png").mkdir()
        return ["detect", "canny", str(at / "photo.png")]

    def loop(at: Path) -> list[str]:
        (at / "photo.png").symlink_to(at / "photo.png")
        return ["detect", "canny", str(at / "photo.png")]

    yield Case("a folder as a photo", folder)
    yield Case("a link to itself", loop)


def _one_file(name: str, file: str, data: bytes, *args: str) -> Case:
    def prepare(at: Path) -> list[str]:
        (at / file).write_bytes(data)
        return [args[0], args[1], str(at / file), *args[2:]]

    return Case(name, prepare)


def png_texts(models: Models) -> Iterator[Case]:
    """What a condition's PNG text says, in `generate` and in `score`."""
    people = [[[0.5, 0.1 + 0.04 * k, 1.0] for k in range(18)]]
    good = {"kind": "pose", "detector": "blazepose", "options": {}, "size": [64, 64], "resize": "crop",
            "keypoints": people}  # fmt: skip
    lined = {"kind": "canny", "detector": "opencv", "options": {"low": 50, "high": 100}, "resize": "crop"}
    for command in ("generate", "score"):
        for kind, fields in (("pose", good), ("canny", lined)):
            for name, text in some(spoilt_json(fields), 22):

                def prepare(at: Path, text: str = text, command: str = command) -> list[str]:
                    (at / "map.png").write_bytes(with_text(lines(), text))
                    (at / "image.png").write_bytes(encoded("PNG", lines()))
                    if command == "generate":
                        return models.generate(str(at / "map.png"))
                    return ["score", str(at / "image.png"), "--cond", str(at / "map.png"), "--offline"]

                yield Case(f"{command} {kind} {name}", prepare)


def records(models: Models) -> Iterator[Case]:
    """What an image's record says, in `replay` and in `score`."""
    condition = {"path": "map.png", "kind": "canny", "net": str(models.net), "scale": 1.0, "start": 0.0, "end": 1.0,
                 "weighting": "uniform"}  # fmt: skip
    good = {
        "prompt": "x", "negative": "", "steps": 1, "guidance": 7.5, "size": [64, 64], "scheduler": "ddim", "seed": 1,
        "base": str(models.base), "control_on": "both", "conditions": [condition], "device": "cpu", "dtype": "float32",
        "batch": 1, "place": 0, "low_memory": False, "versions": {},
    }  # fmt: skip
    texts = [
        (f"record {name}", text, command) for name, text in some(spoilt_json(good), 110) for command in ("replay",)
    ]
    for name, text in some(spoilt_json(condition), 60):
        try:
            texts.append((f"condition {name}", json.dumps(good | {"conditions": [json.loads(text)]}), "replay"))
        except (ValueError, RecursionError):
            continue
    texts += [(f"record {name}", text, "score") for name, text in some(spoilt_json(good), 25)]
    for name, text, command in texts:

        def prepare(at: Path, text: str = text, command: str = command) -> list[str]:
            (at / "map.png").write_bytes(encoded("PNG", lines()))
            (at / "image.png").write_bytes(with_text(lines(), text))
            return [command, str(at / "image.png"), "--offline"]

        yield Case(f"{command} {name}", prepare)


def jobs(models: Models) -> Iterator[Case]:
    good = {"cond": f"map.canny.png,net={models.net}", "prompt": "x", "seed": 1, "num": 1, "steps": 1, "size": "64",
            "guidance": 2, "scheduler": "ddim", "mode": "balanced", "weighting": "soft", "out": "x.png",
            "base": str(models.base)}  # fmt: skip
    files: list[tuple[str, str, bytes]] = [
        (f"jobs {name}", "jobs.jsonl", text.encode("utf-8", "surrogatepass"))
        for name, text in some(spoilt_json(good), 45)
    ]
    table = b"prompt,seed,steps\nx,1,1\n"
    files += [(f"csv {name}", "jobs.csv", data) for name, data in spoilt(table)]
    files += [
        ("utf-16", "jobs.jsonl", json.dumps(good).encode("utf-16")), ("a NUL", "jobs.csv", b"prompt\na\0b\n"),
        ("an open quote", "jobs.csv", b'prompt,seed\n"x,1\n'),
        ("a long field", "jobs.csv", b"prompt\n" + b"x" * 200_000),
    ]  # fmt: skip
    for name, file, data in files:

        def prepare(at: Path, file: str = file, data: bytes = data) -> list[str]:
            (at / "map.canny.png").write_bytes(encoded("PNG", lines()))
            (at / file).write_bytes(data)
            return ["generate", "--base", str(models.base), "--steps", "1", "-q", "--jobs", str(at / file)]

        yield Case(name, prepare)


def data_sets() -> Iterator[Case]:
    """Metadata of training data, in `dataset check`."""
    good = {"file_name": "0.png", "conditioning_image": "0.canny.png", "text": "a cube", "split": "train"}
    texts = [
        ("metadata.jsonl", name, text.encode("utf-8", "surrogatepass")) for name, text in some(spoilt_json(good), 40)
    ]
    source = {"source": "0.canny.png", "target": "0.png", "prompt": "a cube"}
    texts += [
        ("prompt.json", name, text.encode("utf-8", "surrogatepass")) for name, text in some(spoilt_json(source), 25)
    ]
    manifest = {"kind": "canny", "size": [64, 64]}
    texts += [
        ("manifest.json", name, text.encode("utf-8", "surrogatepass")) for name, text in some(spoilt_json(manifest), 12)
    ]
    texts += [("metadata.csv", name, data) for name, data in spoilt(b"file_name,text\n0.png,a cube\n")]
    texts += [("metadata.parquet", name, data) for name, data in spoilt(b"PAR1 and so on PAR1")]
    texts += [
        ("0.txt", "latin-1", b"caf\xe9"),
        ("0.txt", "utf-16", "a cube".encode("utf-16")),
        ("0.txt", "a NUL", b"a\0b"),
    ]
    for file, name, data in texts:

        def prepare(at: Path, file: str = file, data: bytes = data) -> list[str]:
            for i in range(5):
                (at / f"{i}.png").write_bytes(encoded("PNG", photo() + np.uint8(i)))
            (at / "0.canny.png").write_bytes(encoded("PNG", photo() // 255 * 255))
            (at / file).write_bytes(data)
            return ["dataset", "check", str(at), "-q", "-o", str(at / "sheet-check.png")]

        yield Case(f"{file} {name}", prepare)


def key_points() -> Iterator[Case]:
    """OpenPose's JSON, in `detect pose`."""
    row = [v for k in range(18) for v in (30, 5 + 3 * k, 1)]
    good = {"people": [{"pose_keypoints_2d": row}], "canvas_width": 64, "canvas_height": 64}
    texts = some(spoilt_json(good), 30)
    for value in (*VALUES, row[:-1], [float("nan")] * 54, ["x"] * 54, [1e300] * 54):
        texts.append((f"person {str(value)[:8]!a}", json.dumps(good | {"people": [{"pose_keypoints_2d": value}]})))
    for name, text in texts:

        def prepare(at: Path, text: str = text) -> list[str]:
            (at / "points.json").write_text(text)
            return ["detect", "pose", str(at / "points.json"), "--size", "64"]

        yield Case(f"points {name}", prepare)


def weight_files(models: Models) -> Iterator[Case]:
    """Files of tensors, in `models show` and `generate`."""
    good = (models.net / "diffusion_pytorch_model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    for name, data in spoilt(good):
        yield _net(models, f"safetensors {name}", "diffusion_pytorch_model.safetensors", data)
    for key, value in (("shape", [-1]), ("shape", [10**12]), ("dtype", "X9"), ("dtype", "F8_E4M3"),
                       ("data_offsets", [0, 10**12]), ("data_offsets", [5, 1])):  # fmt: skip
        text = json.dumps(header | {first: header[first] | {key: value}}).encode()
        data = len(text).to_bytes(8, "little") + text + good[8 + length :]
        yield _net(models, f"header {key} {value}", "diffusion_pytorch_model.safetensors", data)
    for size in (0, 2, 2**40):
        yield _net(
            models, f"header of {size}", "diffusion_pytorch_model.safetensors", size.to_bytes(8, "little") + b"{}"
        )
    pickles = {
        "a list": pickle.dumps([1]),
        "a function": pickle.dumps(print),
        "text": b"hello",
        "zip": b"PK\3\4" + bytes(50),
    }
    for name, data in [*pickles.items(), *spoilt(pickle.dumps({"a": 1}))]:

        def prepare(at: Path, data: bytes = data) -> list[str]:
            (at / "model.pth").write_bytes(data)
            return ["models", "show", str(at / "model.pth")]

        yield Case(f"pickle {name}", prepare)


def _net(models: Models, name: str, file: str, data: bytes) -> Case:
    """A ControlNet's folder in which one file is another one."""

    def prepare(at: Path) -> list[str]:
        shutil.copytree(models.net, at / "net")
        (at / "net" / file).write_bytes(data)
        (at / "map.canny.png").write_bytes(encoded("PNG", lines()))
        return models.generate(f"{at / 'map.canny.png'},net={at / 'net'}")

    return Case(name, prepare)


def configs(models: Models) -> Iterator[Case]:
    """The JSON files of a ControlNet and of a base."""
    config = json.loads((models.net / "config.json").read_text())
    for name, text in some(spoilt_json(config), 60):
        yield _net(models, f"net config {name}", "config.json", text.encode("utf-8", "surrogatepass"))
    for file, count in (("unet/config.json", 45), ("vae/config.json", 25), ("text_encoder/config.json", 25),
                        ("scheduler/scheduler_config.json", 25), ("model_index.json", 15),
                        ("tokenizer/tokenizer_config.json", 15)):  # fmt: skip
        good = json.loads((models.base / file).read_text())
        for name, text in some(spoilt_json(good), count):

            def prepare(at: Path, file: str = file, text: str = text) -> list[str]:
                shutil.copytree(models.base, at / "base")
                (at / "base" / file).write_bytes(text.encode("utf-8", "surrogatepass"))
                return ["generate", "--base", str(at / "base"), "-p", "x", "--steps", "1", "--seed", "1", "-q",
                        "--size", "64"]  # fmt: skip

            yield Case(f"base {file} {name}", prepare)


def flags(models: Models) -> Iterator[Case]:
    """Values of flags, of `--cond` and of settings."""
    for flag in ("--size", "--seed", "--steps", "--num", "--guidance", "--scheduler", "--mode", "--control-on",
                 "--weighting", "--device", "--dtype"):  # fmt: skip
        for value in ("", "-1", "nan", "1e99", "0", "99999999999999999999", "é"):
            usual = [] if flag == "--steps" else ["--steps", "1"]
            args = ["generate", "--base", str(models.base), "-p", "x", f"{flag}={value}", *usual]
            yield _flag(f"{flag} {value!r}", *args)
    for key in ("scale", "start", "end", "weighting", "region", "net", "detect", "kind"):
        for value in ("", "-1", "nan", "1@2", "1/1", "x" * 300, "é"):
            yield _flag(f"cond {key}={value[:9]!r}", *models.generate(f"MAP,net={models.net},{key}={value}"))
    for setting in (
        "size",
        "batch_size",
        "max_steps",
        "learning_rate",
        "crops",
        "precision",
        "minutes",
        "hint",
        "nothing",
    ):
        for value in ("", "-1", "nan", "1e99", "100000000", "x", "3.5"):
            args = ["train", "DATA", "--set", f"{setting}={value}", "-o", "run", "-q", "--base", str(models.base)]
            yield _flag(f"set {setting}={value}", *args)


def _flag(name: str, *args: str) -> Case:
    def prepare(at: Path) -> list[str]:
        (at / "map.canny.png").write_bytes(encoded("PNG", lines()))
        return [arg.replace("MAP", str(at / "map.canny.png")).replace("DATA", str(at / "none")) for arg in args]

    return Case(name, prepare)
