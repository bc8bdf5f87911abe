"""Reading what people have, refusing what is no picture, and writing whole files or none."""

import io
import zlib

import cv2
import numpy as np
import pytest
from controlnet.preprocessors import images
from controlnet.preprocessors.errors import InputError, OutputError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_bytes, read_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


def encode(image: Image.Image, format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def gradient() -> np.ndarray:
    y, x = np.mgrid[0:24, 0:32]
    return np.stack([x * 8, y * 10, x * 4 + y], -1).astype(np.uint8)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right
    data = encode(Image.fromarray(gradient()), "PNG", exif=exif)
    assert np.array_equal(read_image(data, "x")[0], np.rot90(gradient(), -1))


def test_grey_sixteen_bit_cmyk_palette_and_alpha():
    grey = gradient()[..., 0]
    assert np.array_equal(read_image(encode(Image.fromarray(grey), "PNG"), "x")[0], np.repeat(grey[..., None], 3, 2))

    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(read_image(encode(deep, "PNG"), "x")[0][..., 0], grey)

    cmyk = Image.fromarray(gradient()).convert("CMYK")
    assert np.abs(read_image(encode(cmyk, "TIFF"), "x")[0].astype(int) - gradient()).max() <= 2

    rgba = np.dstack([gradient(), np.zeros((24, 32), np.uint8)])
    rgba[:12, :, 3] = 255
    read = read_image(encode(Image.fromarray(rgba), "PNG"), "x")[0]
    assert np.array_equal(read[:12], gradient()[:12])
    assert (read[12:] == 255).all()

    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([200, 10, 10, 0, 0, 0])
    palette.paste(1, (0, 0, 8, 16))
    read = read_image(encode(palette, "PNG", transparency=1), "x")[0]
    assert (read[:, :8] == 255).all()
    assert (read[:, 8:] == (200, 10, 10)).all()


def test_the_first_frame_of_an_animation_is_used_and_said():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    said = []
    assert (read_image(data, "x.gif", said.append)[0] == (255, 0, 0)).all()
    assert "2 frames" in said[0]


def header_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "truncated": (encode(Image.fromarray(gradient()), "PNG")[:-60], "cut off or damaged"),
    "truncated jpeg": (
        encode(Image.fromarray(gradient().repeat(8, 0).repeat(8, 1)), "JPEG")[:500],
        "cut off or damaged",
    ),
    "mislabelled": (b"%PDF-1.7 this is no picture", "is not a picture"),
    "text": ("héllo".encode(), "is not a picture"),
    "one pixel": (encode(Image.new("RGB", (1, 1)), "PNG"), "at least 8"),
    "one row": (encode(Image.new("RGB", (4000, 1)), "PNG"), "at least 8"),
    "huge": (header_of_size(40_000, 40_000), "40000x40000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_by_name(name):
    data, reason = BAD[name]
    with pytest.raises(InputError, match=reason) as caught:
        read_image(data, "the-name.png")
    assert "the-name.png" in str(caught.value)


def test_huge_is_refused_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "_to_rgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(InputError):
        read_image(header_of_size(40_000, 40_000), "x")


def test_files_missing_empty_and_folders(tmp_path):
    (tmp_path / "empty.png").touch()
    for name, reason in (("none.png", "no such file"), ("empty.png", "is empty"), ("", "is a folder")):
        with pytest.raises(InputError, match=reason):
            read_bytes(str(tmp_path / name))


def test_png_keeps_pixels_and_text():
    text = {"controlnet": '{"prompt": "ein rötliches Haus, 家"}', "parameters": "a\nb"}
    image, read = read_image(png_bytes(gradient(), text), "x")
    assert np.array_equal(image, gradient())
    assert read == text


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new" / "a.png"
    write_file(target, b"one")
    assert target.read_bytes() == b"one"

    def broken(self, other):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", broken)
    with pytest.raises(OutputError, match="No space left"):
        write_file(target, b"two")
    assert target.read_bytes() == b"one"
    assert [p.name for p in target.parent.iterdir()] == ["a.png"]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 999))
def test_two_levels_are_written_as_any_png(height, width, seed):
    """And read by other libraries, text and all."""
    map_ = (np.random.default_rng(seed).random((height, width)) < 0.3).astype(np.uint8) * 255
    data = png_bytes(map_, {"controlnet": '{"ä": 1}', "b": "two\nlines"}, two_levels=True)
    with Image.open(io.BytesIO(data)) as made:
        assert made.mode == "L" and (np.asarray(made) == map_).all()
        assert made.text == {"controlnet": '{"ä": 1}', "b": "two\nlines"}
    assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) == map_).all()
