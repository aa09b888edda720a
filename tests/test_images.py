"""What becomes of an encoded image, for every kind of pixels that a file can have."""

import io
import os

import numpy as np
import pytest
from damaged_data import encoded, png
from PIL import EpsImagePlugin, Image

from diffusers_cl.images import conversions, image_bytes, open_image, to_uint8_array


# An 8x8 image of two halves: dark and bright in grey, red and blue in colours.
LEFT, RIGHT = 40, 200
HALVES = np.repeat(np.array([[LEFT] * 4 + [RIGHT] * 4], dtype=np.uint8), 8, axis=0)
GREY = Image.fromarray(HALVES)
COLOURS = np.stack([np.where(HALVES == LEFT, 255, 0), HALVES * 0, np.where(HALVES == LEFT, 0, 255)], axis=-1)
COLOUR = Image.fromarray(COLOURS.astype(np.uint8))
# ITU-R 601-2 luma of pure red and blue.
LUMA = [76, 29]
WIDE = HALVES.astype(np.uint16) * 257


def read(content: bytes, channels: int = 1, resolution: int = 8, resize_mode: str = "resize"):
    """Returns the pixels of the two halves, and the conversions."""
    image = open_image(content)
    kinds = conversions(image, channels)
    pixels = to_uint8_array(image, channels, resolution, resize_mode)
    assert pixels.shape == (resolution, resolution, channels) and pixels.dtype == np.uint8
    return pixels[4, [1, 6]].squeeze(-1).tolist() if channels == 1 else pixels[4, [1, 6]].tolist(), kinds


def with_alpha(image: Image.Image) -> Image.Image:
    """Makes the right half transparent; its colours stay."""
    image = image.copy()
    image.putalpha(Image.fromarray(np.where(HALVES == LEFT, 255, 0).astype(np.uint8)))
    return image


def png16(values: np.ndarray, colour: int) -> bytes:
    """Returns a PNG of 16 bits a channel from values of shape `(8, 8, channels)`."""
    return png(8, 8, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values), bits=16, colour=colour)


palette, bits = COLOUR.quantize(4), Image.fromarray(HALVES > 100)
TRANSPARENT = palette.getpixel((6, 4))
wide_colours = COLOURS.astype(np.uint16) * 257
# In grey: the encoded image, the two halves, the conversions.
GREY_CASES = {
    "L": (encoded(GREY), [LEFT, RIGHT], []),
    "LA": (encoded(with_alpha(GREY)), [LEFT, RIGHT], ["transparent"]),
    "L with a transparent level": (encoded(GREY, transparency=RIGHT), [LEFT, RIGHT], ["transparent"]),
    "1": (encoded(bits), [0, 255], ["1-bit"]),
    "1 in a TIFF": (encoded(bits, "TIFF", compression="group4"), [0, 255], ["1-bit"]),
    "I;16": (encoded(Image.fromarray(WIDE)), [LEFT, RIGHT], ["16-bit"]),
    "I;16 in a TIFF": (encoded(Image.fromarray(WIDE), "TIFF"), [LEFT, RIGHT], ["16-bit"]),
    "I;16B": (encoded(Image.fromarray(WIDE.astype(">u2")), "TIFF"), [LEFT, RIGHT], ["16-bit"]),
    "I": (encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), [LEFT, RIGHT], ["16-bit"]),
    "16-bit PGM": (b"P5 8 8 65535\n" + WIDE.astype(">u2").tobytes(), [LEFT, RIGHT], ["16-bit"]),
    "10-bit PGM": (b"P5 8 8 1023\n" + (WIDE >> 6).astype(">u2").tobytes(), [LEFT, RIGHT], ["16-bit"]),
    "RGB": (encoded(COLOUR), LUMA, ["colour to grey"]),
    "P": (encoded(palette), LUMA, ["palette"]),
    "CMYK": (encoded(COLOUR.convert("CMYK"), "TIFF"), LUMA, ["CMYK", "colour to grey"]),
}
RED, BLUE = [255, 0, 0], [0, 0, 255]
COLOUR_CASES = {
    "RGB": (encoded(COLOUR), [RED, BLUE], []),
    "RGBA": (encoded(with_alpha(COLOUR)), [RED, BLUE], ["transparent"]),
    "P": (encoded(palette), [RED, BLUE], ["palette"]),
    "P with transparency": (encoded(palette, transparency=TRANSPARENT), [RED, BLUE], ["palette", "transparent"]),
    "P with levels": (encoded(palette, transparency=bytes([0, 128])), [RED, BLUE], ["palette", "transparent"]),
    "16-bit RGB": (png16(wide_colours, 2), [RED, BLUE], ["16-bit"]),
    "16-bit RGBA": (
        png16(np.concatenate([wide_colours, wide_colours[..., :1]], axis=-1), 6),
        [RED, BLUE],
        ["16-bit", "transparent"],
    ),
    "CMYK": (encoded(COLOUR.convert("CMYK"), "TIFF"), [RED, BLUE], ["CMYK"]),
    "L": (encoded(GREY), [[LEFT] * 3, [RIGHT] * 3], []),
    "1": (encoded(bits), [[0] * 3, [255] * 3], ["1-bit"]),
    "I;16": (encoded(Image.fromarray(WIDE)), [[LEFT] * 3, [RIGHT] * 3], ["16-bit"]),
}


@pytest.mark.parametrize(("content", "expected", "kinds"), GREY_CASES.values(), ids=list(GREY_CASES))
def test_grey(content, expected, kinds):
    assert read(content) == (expected, kinds)


@pytest.mark.parametrize(("content", "expected", "kinds"), COLOUR_CASES.values(), ids=list(COLOUR_CASES))
def test_colours(content, expected, kinds):
    assert read(content, channels=3) == (expected, kinds)


def test_cmyk_jpeg():
    """Its inks are stored inverted, as Adobe does; JPEG is not exact."""
    pixels, kinds = read(encoded(COLOUR.convert("CMYK"), "JPEG", quality=100, subsampling=0), channels=3)
    assert kinds == ["CMYK"] and np.abs(np.array(pixels) - [RED, BLUE]).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames(kind):
    others = [Image.new("L", (8, 8), level) for level in (90, 130)]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "MPO" else {}
    pixels, kinds = read(encoded(GREY, kind, save_all=True, append_images=others, **options))
    assert "first frame" in kinds and np.abs(np.array(pixels) - [LEFT, RIGHT]).max() <= 2


def test_the_orientation_is_that_of_the_file():
    exif = Image.Exif()
    # Turned by 180 degrees, says the camera.
    exif[0x0112] = 3
    assert read(encoded(GREY, exif=exif)) == ([LEFT, RIGHT], [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "floating point"),
        (encoded(Image.new("I", (8, 8), 65536), "TIFF"), "65536 to 65536; allowed: 0 to 65535"),
        (encoded(Image.new("I", (8, 8), -1), "TIFF"), "-1"),
        (encoded(Image.new("LAB", (8, 8)), "TIFF"), "LAB"),
        (png(3_000_000, 1, bytes(3_000_001)), "3000000x1 is too long"),
    ],
    ids=["F", "I", "negative", "LAB", "a thread"],
)
def test_pixels_that_are_refused(content, words):
    with pytest.raises(ValueError, match=words):
        read(content)


def test_an_image_larger_than_its_frame():
    assert read(encoded(GREY), resolution=16, resize_mode="pad")[0] == [0, LEFT]
    with pytest.raises(ValueError, match="8x8 is larger than resolution 4"):
        read(encoded(GREY), resolution=4, resize_mode="pad")


def test_what_is_no_image(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "image.png").write_bytes(encoded(GREY))
    os.mkfifo(tmp_path / "pipe.png")
    assert image_bytes({"bytes": None, "path": str(tmp_path / "image.png")}) == encoded(GREY)
    assert image_bytes({"bytes": b"x", "path": "any name"}) == b"x"
    for entry, words in [
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        ({"bytes": b"", "path": None}, "0 bytes"),
        ({"bytes": None, "path": str(tmp_path / "empty.png")}, "0 bytes"),
        ({"bytes": None, "path": str(tmp_path / "pipe.png")}, "not a file"),
        ({"bytes": None, "path": str(tmp_path)}, "not a file"),
    ]:
        with pytest.raises(ValueError, match=words):
            image_bytes(entry)
    with pytest.raises(FileNotFoundError):
        image_bytes({"bytes": None, "path": str(tmp_path / "gone.png")})
    with pytest.raises(ValueError, match="no image in a format that is read"):
        open_image(b"text")


def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    canary = tmp_path / "canary"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="no image in a format that is read"):
        open_image(program)
    assert not canary.exists()
    # It would have been.
    with pytest.raises(OSError), Image.open(io.BytesIO(program)) as image:
        image.load()
    assert canary.exists()
