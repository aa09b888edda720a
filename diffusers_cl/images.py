"""From an encoded image to the pixels that the model sees; it knows no dataset and no configuration."""

import contextlib
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from torchvision.transforms import functional as transforms

from .errors import first_line


# What is read, whatever a file's name says. EPS is a program, which Pillow would give to Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# More than an image of PIL.Image.MAX_IMAGE_PIXELS takes.
MAX_FILE_BYTES = 2**30


class UnreadableImageError(ValueError):
    """An image cannot be used; the message says why."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """
    Turns whatever Pillow's readers stumble over in the `with` block, also `IndexError`, `struct.error` and `zlib.error`, into
    an `UnreadableImageError`.
    """
    try:
        yield
    except Exception as error:
        raise UnreadableImageError(getattr(error, "strerror", None) or first_line(error)) from error


def image_bytes(entry: dict | None) -> bytes:
    """
    Returns an image as it is encoded.

    Args:
        entry (`dict`): what an image column that is not decoded has in a row: `bytes`, or the `path` of a file.

    Raises:
        ValueError, OSError: there is nothing to decode.
    """
    if entry is None or (entry["bytes"] is None and entry["path"] is None):
        raise ValueError("the row has no image")
    content = entry["bytes"]
    if content is None:
        status = os.stat(entry["path"])
        # A pipe or a device would be read for ever.
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"not a file of at most {MAX_FILE_BYTES} bytes")
        content = Path(entry["path"]).read_bytes()
    if not content:
        raise ValueError("it has 0 bytes")
    return content


def open_image(content: bytes) -> PIL.Image.Image:
    """Returns an image whose pixels are not decoded yet; raises `ValueError` where it has none of `FORMATS`."""
    try:
        return PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise ValueError(f"no image in a format that is read ({', '.join(FORMATS)})") from None


def conversions(image: PIL.Image.Image, channels: int) -> list[str]:
    """Returns what [`to_uint8_array`] changes of an image that is not decoded yet, beside its size."""
    found = {
        "16-bit": image.mode.startswith("I") or any(re.search(";16[BLN]", str(tile.args)) for tile in image.tile),
        "1-bit": image.mode == "1",
        "palette": image.mode in ("P", "PA"),
        "CMYK": image.mode == "CMYK",
        "transparent": image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info,
        "colour to grey": channels == 1 and image.mode in ("RGB", "RGBA", "CMYK"),
        "first frame": getattr(image, "is_animated", False),
    }
    return [kind for kind, holds in found.items() if holds]


def to_uint8_array(image: PIL.Image.Image, channels: int, resolution: int, resize_mode: str) -> np.ndarray:
    """
    Returns what the model sees of an image: its first frame, as it is stored (whatever its EXIF orientation), with the
    colours that transparent pixels have. 16-bit greyscale is scaled, because `.convert` would clip it to white.

    Args:
        image (`PIL.Image.Image`).
        channels (`int`): 1 or 3.
        resolution (`int`), resize_mode (`str`): as in the configuration.

    Returns:
        `np.ndarray`: uint8, of shape `(resolution, resolution, channels)`.

    Raises:
        ValueError: for pixels whose range is not known, and for an image that is too large.
    """
    if image.mode == "F":
        raise ValueError("floating point pixels, whose range is not known")
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit pixels from {values.min():.0f} to {values.max():.0f}; allowed: 0 to 65535")
        image = PIL.Image.fromarray((values / 257).round().astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if resize_mode == "resize":
        if resolution**2 * max(image.size) / min(image.size) > PIL.Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.size[0]}x{image.size[1]} is too long to resize its shorter side to {resolution}")
        image = transforms.resize(image, resolution)
    elif max(image.size) > resolution:
        raise ValueError(f"{image.size[0]}x{image.size[1]} is larger than resolution {resolution} (resize_mode: pad)")
    return np.asarray(transforms.center_crop(image, resolution)).reshape(resolution, resolution, channels)
