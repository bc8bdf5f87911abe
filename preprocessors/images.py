"""Reading photos and writing pictures: in memory an image is (H, W, 3) uint8 RGB, whatever the file was.

EXIF orientation is applied; grey, palette, 16-bit and CMYK are converted, transparency is laid over white.
"""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from controlnet.preprocessors.errors import InputError, OutputError, reason
from controlnet.preprocessors.files import exists, is_dir
from controlnet.preprocessors.films import ENDINGS
from controlnet.preprocessors.metadata import KEY, exif_of, text_in
from controlnet.preprocessors.remote import is_url, read_url
from controlnet.preprocessors.tars import read_member, split
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 250_000_000
"""Larger pictures are refused by their header, before they are decoded."""
MIN_SIDE = 8
JPEG_EXIF = 65_000
"""Bytes of EXIF that a JPEG holds."""
ORIENTATION = 0x0112
"""The EXIF tag of how a picture is turned; from 5 on width and height are exchanged."""
_FILMS = (b"ftypisom", b"ftypmp42", b"ftypqt  ", b"ftypM4V ", b"ftypmp41", b"ftypavc1")
"""Bytes 4 to 12 of common videos."""
_NO_PICTURES = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
"""Formats that Pillow lists but reads only with another program, or that hold no picture."""
_OTHERS = (
    ".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw", ".exr", ".svg",
    ".eps", ".pdf",
)  # fmt: skip
"""Endings of pictures that Pillow does not read by itself."""

Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before any pixel is decoded


@cache
def suffixes() -> frozenset[str]:
    """The file endings, in lower case, of pictures that can be read here; a folder is searched for these."""
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    Image.init()
    known = Image.registered_extensions()
    return frozenset(ending for ending, name in known.items() if name in Image.OPEN and name not in _NO_PICTURES)


def why_skipped(path: Path) -> str:
    """Why a file that looks like a picture by its name cannot be read here, with the remedy; "" for other files."""
    ending = path.suffix.lower()
    if ending in suffixes() or ending not in _OTHERS:
        return ""
    if ending in (".heic", ".heif"):
        return "HEIC needs: pip install pillow-heif"
    return f"{ending} files are not read: save it as PNG or JPEG"


def read_bytes(source: str) -> bytes:
    """The bytes of a file, of one behind a URL or in a tar file (tars.py), or of standard input for `-`, which is read
    once and remembered. Raises InputError naming what is wrong."""
    if source == "-":
        data = _standard_input()
    elif inside := split(source):
        data = read_member(*inside)
    elif is_url(source):
        data = read_url(source)
    else:
        path = Path(source)
        if not exists(path):
            raise InputError(f"{source}: no such file", f"ls {path.parent}")
        if is_dir(path):
            raise InputError(f"{source}: is a folder, expected a picture", f"ls {source}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    if not data:
        raise InputError(f"{source}: is empty, expected a picture", "the name of a picture")
    return data


_piped: list[Any] = [None, b""]
"""The standard input that was read, and its bytes."""


def _standard_input() -> bytes:
    if _piped[0] is not sys.stdin:
        _piped[:] = sys.stdin, sys.stdin.buffer.read()
    return _piped[1]


def read_image(data: bytes, name: str, warn=lambda text: None) -> tuple[np.ndarray, dict[str, str]]:
    """Decode a picture to (H, W, 3) uint8 RGB, and return the text it carries (PNG text chunks).

    Raises InputError for data that is not a picture or is cut off, and for a picture with more than MAX_PIXELS pixels
    or a side under MIN_SIDE.
    """
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(
                f"{name}: {width}x{height} pixels, expected at most {MAX_PIXELS // 10**6} million",
                "make it smaller first, for example with: convert PHOTO -resize 4096x4096 SMALLER.png",
            )
        if min(width, height) < MIN_SIDE:
            raise InputError(f"{name}: {width}x{height} pixels, expected at least {MIN_SIDE} on each side")
        if (frames := getattr(image, "n_frames", 1)) > 1:
            warn(f"{name}: has {frames} frames, only the first is used")
        text = text_in(image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on broken EXIF or palettes: only the pixels matter
            return _to_rgb(_upright(image)), text
    except InputError:
        raise
    except UnidentifiedImageError as error:
        if name.lower().endswith(ENDINGS) or data[4:12] in _FILMS:
            raise InputError(f"{name}: is a video, expected a picture", f"controlnet detect canny {name}") from error
        if why := why_skipped(Path(name)) or ("HEIC needs: pip install pillow-heif" if data[4:8] == b"ftyp" else ""):
            raise InputError(f"{name}: cannot be read here", why) from error
        what = "is cut off or damaged" if _looks_like_image(data) else "is not a picture"
        raise InputError(f"{name}: {what}", f"file {name}") from error
    except Exception as error:  # Pillow's decoders raise a dozen types for broken data
        what = "is cut off or damaged" if _looks_like_image(data) else "is not a picture"
        raise InputError(f"{name}: {what} ({reason(error)})", f"file {name}") from error


def read_rgba(data: bytes) -> np.ndarray | None:
    """A picture with its transparency, (H, W, 4) uint8, its colours not laid over white, turned as `read_image` turns
    it; None if it has none. `data` is of a picture that `read_image` reads."""
    image = Image.open(io.BytesIO(data))
    if not {"A", "a"} & set(image.getbands()) and "transparency" not in image.info:
        return None
    return np.asarray(_upright(image).convert("RGBA"))


def alpha_of(data: bytes) -> np.ndarray | None:
    """The transparency (H, W) uint8 of a picture that `read_image` reads; None if it has none."""
    rgba = read_rgba(data)
    return None if rgba is None else np.ascontiguousarray(rgba[..., 3])


def sixteen_bits(data: bytes) -> bool:
    """Whether a picture has more than 8 bits a level, which `read_image` leaves of them."""
    with Image.open(io.BytesIO(data)) as image:
        return image.mode.startswith("I;16") or image.mode in ("I", "F")


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a picture as `read_image` decodes it, from its header; (1, 1) for one that is none."""
    try:
        image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(ORIENTATION, 1) >= 5
    except Exception:  # Pillow raises a dozen types; whoever decodes it says what is wrong
        return 1, 1
    return (image.height, image.width) if turned else image.size


def _looks_like_image(data: bytes) -> bool:
    magic = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
    return data.startswith(magic)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode != "F" else max(1.0, float(values.max()))
        grey = np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says; the same one if that says nothing, where Pillow would copy it."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def picture_bytes(image: np.ndarray, text: dict[str, str], ending: str) -> bytes:
    """A picture (H, W, 3) uint8 with text, as a PNG, or for the endings .jpg, .jpeg and .webp as such a file: they keep
    the pixels only nearly."""
    if ending == ".png":
        return png_bytes(image, text)
    buffer = io.BytesIO()
    if ending == ".webp":
        Image.fromarray(image).save(buffer, "WEBP", quality=95, exif=exif_of(text))
        return buffer.getvalue()
    own = {key: value for key, value in text.items() if key == KEY}
    fitting = [carried for carried in (text, own) if len(exif_of(carried).tobytes()) <= JPEG_EXIF]
    if not fitting:
        raise OutputError(
            f"the record of {len(text[KEY])} letters does not fit into a JPEG", "-o NAME.webp, or NAME.png"
        )
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif_of(fitting[0]))
    return buffer.getvalue()


def png_bytes(image: np.ndarray, text: dict[str, str] | None = None, two_levels: bool = False) -> bytes:
    """A PNG of (H, W), (H, W, 3) or (H, W, 4) uint8, or (H, W) uint16, with text chunks. With `two_levels`, for black
    and white pictures (H, W), only runs of equal bytes are compressed: three times as fast, and smaller."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    if two_levels and image.ndim == 2:
        return _in_runs(image, info)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _in_runs(image: np.ndarray, info: PngImagePlugin.PngInfo) -> bytes:
    """A grey PNG whose rows are not filtered, which Pillow always tries first."""
    height, width = image.shape
    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = image
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 8, zlib.Z_RLE)
    packed = packer.compress(rows.tobytes()) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    buffer = io.BytesIO(PNG_BEGINS)
    buffer.seek(0, io.SEEK_END)
    text = [(name, data) for name, data, *_ in info.chunks]
    for name, data in ((b"IHDR", header), *text, (b"IDAT", packed), (b"IEND", b"")):
        PngImagePlugin.putchunk(buffer, name, data)
    return buffer.getvalue()
