"""Data folders that are damaged in one place each, and what is expected of them."""

import io
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


# The grey level of a class tells it from the others, whatever becomes of its images.
LEVELS = {"ant": 4, "bee": 128, "cat": 250}
PER_CLASS = 6
SIZE = 8


@dataclass
class Case:
    """
    A folder under construction: where it lies, what is drawn for it, and what is expected of it: `refused` with `words` in
    the message, `loads`, or a kind of conversion.
    """

    folder: Path
    rng: np.random.Generator
    expected: str = "refused"
    words: list[str] = field(default_factory=list)
    settings: dict = field(default_factory=dict)

    def write(self, path: str, content: bytes | Image.Image) -> Path:
        """Writes an image, or the bytes of what should be one, below the folder."""
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else encoded(content))
        return path

    def images(self, top: str = "") -> None:
        """Writes a sound image folder."""
        for name in LEVELS:
            for index in range(PER_CLASS):
                self.write(f"{top}{name}/{index}.png", plain(name))

    def one(self) -> str:
        """Returns the name of a class."""
        return str(self.rng.choice(list(LEVELS)))

    def bad(self, content: bytes | Image.Image, suffix: str = "png") -> None:
        """Puts one image among the sound ones, which the message has to name."""
        self.images()
        self.words.append(str(self.write(f"{self.one()}/odd.{suffix}", content)))

    def parquet(self, split: str, rows: list[tuple], feature=None, names: tuple = tuple(LEVELS)) -> None:
        """Writes `(image, label)` rows as they are, without the checks of `datasets`."""
        features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=names)})
        columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], []]
        schema = features.arrow_schema
        arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), file)

    def rows(self, names: tuple = tuple(LEVELS), number: Callable | None = None) -> list[tuple]:
        """Returns sound rows, whose labels are places in `names` or what `number` makes of a class name."""
        number = number or names.index
        return [({"bytes": encoded(plain(name)), "path": None}, number(name)) for name in LEVELS] * PER_CLASS

    def odd_row(self, split: str, feature=None, number: Callable | None = None, **changed) -> None:
        """Writes one odd row among sound ones, which the message has to name; the other split is sound."""
        rows, row = self.rows(number=number), int(self.rng.integers(3 * PER_CLASS))
        image, label = rows[row]
        rows[row] = changed.get("image", image), changed.get("label", label)
        for name in ("train", "test"):
            self.parquet(name, rows if name == split else self.rows(number=number), feature)
        self.words += [f"row {row} ", f"'{split}'"]


def plain(name: str, mode: str = "L", size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Returns an image of a class."""
    return Image.new("L", size, LEVELS[name]).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Returns an image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noisy(case: Case) -> Image.Image:
    """Returns an image that does not compress, so that a cut is in the middle of its pixels."""
    return Image.fromarray(case.rng.integers(0, 256, (32, 32), dtype=np.uint8))


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """Returns a PNG that may promise more pixels than it has."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def cut(case: Case, kind: str) -> None:
    """An image that ends too early, anywhere."""
    content = encoded(noisy(case), kind)
    case.bad(content[: case.rng.integers(1, len(content))], kind.lower())


def flipped(case: Case) -> None:
    """A PNG with a wrong bit: it has checksums."""
    content = bytearray(encoded(noisy(case)))
    content[case.rng.integers(60, len(content) - 20)] ^= 1 << int(case.rng.integers(8))
    case.bad(bytes(content))


def class_number(name: str) -> int:
    return list(LEVELS).index(name)


def converted(kind: str, make: Callable[[str], bytes], suffix: str = "png") -> Callable[[Case], None]:
    """Returns a case: one image of some class comes in a way that is converted, and counted as `kind`."""

    def build(case: Case) -> None:
        name, case.expected = case.one(), kind
        case.images()
        case.write(f"{name}/odd.{suffix}", make(name))

    return build


def loads(build: Callable[[Case], None]) -> Callable[[Case], None]:
    """Returns a case that is sound after all."""

    def sound(case: Case) -> None:
        case.expected = "loads"
        case.images()
        build(case)

    return sound


def beside(path: str, *words: str, **settings) -> Callable[[Case], None]:
    """Returns a case: an image at another place than the sound ones."""

    def build(case: Case) -> None:
        case.images()
        case.write(path, plain("bee"))
        case.words, case.settings = list(words), settings

    return build


def linked(case: Case) -> None:
    """A class folder that is a link."""
    case.images()
    for index in range(PER_CLASS):
        case.write(f"../elsewhere/{index}.png", plain("bee"))
    shutil.rmtree(case.folder / "bee")
    (case.folder / "bee").symlink_to(case.folder.parent / "elsewhere")
    case.words.append("link")


def without_a_class(case: Case) -> None:
    """A class of the stream has no folder."""
    case.images()
    name = case.one()
    shutil.rmtree(case.folder / name)
    case.words.append(repr(name))


def in_test_split(case: Case) -> None:
    """A bad image that is only evaluated on."""
    case.images("train/")
    case.images("test/")
    case.words.append(str(case.write(f"test/{case.one()}/0.png", b"")))


def swapped(case: Case, *names: str) -> None:
    """Files whose class lists have another order, and labels that are right by their own."""
    turned = ("cat", "ant", "bee")
    case.parquet(names[0], case.rows())
    case.parquet(names[1], case.rows(turned), names=turned)
    case.words.append(f"{names[1]}-00000")


def frames(name: str, kind: str) -> bytes:
    """Returns an animation that begins with an image of the class and goes on with other classes'."""
    others = [plain(other) for other in LEVELS if other != name]
    return encoded(plain(name), kind, save_all=True, append_images=others)


def grey16(name: str) -> np.ndarray:
    return np.full((SIZE, SIZE), LEVELS[name] * 257, dtype=np.uint16)


def palette(name: str) -> Image.Image:
    return plain(name, "RGB").quantize(4)


def pipe(case: Case) -> None:
    """A pipe with the name of an image, which would never end."""
    case.images()
    os.mkfifo(case.folder / case.one() / "odd.png")
    case.words.append("odd.png")


def dangling(case: Case) -> None:
    """A link to no file."""
    case.images()
    (case.folder / case.one() / "odd.png").symlink_to(case.folder / "nowhere.png")
    case.words.append("odd.png")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
INTEGERS, STRINGS, FLOATS = datasets.Value("int64"), datasets.Value("string"), datasets.Value("float64")
CASES: dict[str, Callable[[Case], None]] = {
    **{
        f"truncated {kind}": lambda case, kind=kind: cut(case, kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
    },
    "flipped bit": flipped,
    "zero bytes": lambda case: case.bad(b""),
    "text": lambda case: case.bad(b"this is no image\n" * 9),
    "random bytes": lambda case: case.bad(case.rng.bytes(500), "jpg"),
    "a program": lambda case: case.bad(EPS),
    "bomb": lambda case: case.bad(png(60_000, 60_000, b"")),
    "half a bomb": lambda case: case.bad(png(11_000, 11_000, b"")),
    "a thread": lambda case: case.bad(png(3_000_000, 1, bytes(3_000_001))),
    "floats": lambda case: case.bad(encoded(Image.new("F", (SIZE, SIZE), 0.5), "TIFF"), "tiff"),
    "32 bits": lambda case: case.bad(encoded(Image.new("I", (SIZE, SIZE), 70_000), "TIFF"), "tiff"),
    "larger than its frame": lambda case: (
        case.bad(plain("ant", size=(9, 4))),
        case.settings.update(resize_mode="pad"),
    ),
    "in the test split": in_test_split,
    "in the root": beside("odd.png", "odd.png"),
    "nested": beside("ant/bee/odd.png", "odd.png"),
    "class named like a split": beside("train/odd.png", "would be left out"),
    "class with a split's word": beside("bullet train/odd.png", "would be left out"),
    "file named like a split": beside("ant/a test 1.png", "'train'"),
    "a format left out": lambda case: case.bad(encoded(plain("ant", "RGB"), "AVIF"), "avif"),
    "linked folder": linked,
    "missing class": without_a_class,
    "splits inside classes": lambda case: [
        case.write(f"{n}/train/{i}.png", plain(n)) for n in LEVELS for i in range(6)
    ],
    "RGBA": converted("transparent", lambda name: encoded(plain(name, "RGBA"))),
    "LA": converted("transparent", lambda name: encoded(plain(name, "LA"))),
    "palette": converted("palette", lambda name: encoded(palette(name))),
    "palette with transparency": converted("transparent", lambda name: encoded(palette(name), transparency=0)),
    "CMYK": converted("CMYK", lambda name: encoded(plain(name, "CMYK"), "JPEG"), "jpg"),
    "colours": converted("colour to grey", lambda name: encoded(plain(name, "RGB"))),
    "16-bit PNG": converted("16-bit", lambda name: encoded(Image.fromarray(grey16(name)))),
    "16-bit TIFF": converted("16-bit", lambda name: encoded(Image.fromarray(grey16(name)), "TIFF"), "tif"),
    "16-bit colours": converted(
        "16-bit",
        lambda name: png(
            SIZE, SIZE, (b"\0" + np.repeat(grey16(name)[0], 3).astype(">u2").tobytes()) * SIZE, bits=16, colour=2
        ),
    ),
    "1-bit": converted("1-bit", lambda name: encoded(plain(name, "1"))),
    "animated GIF": converted("first frame", lambda name: frames(name, "GIF"), "gif"),
    "animated WEBP": converted("first frame", lambda name: frames(name, "WEBP"), "webp"),
    "pages of a TIFF": converted("first frame", lambda name: frames(name, "TIFF"), "tiff"),
    "extra class": loads(lambda case: [case.write(f"aardvark/{i}.png", plain("cat")) for i in range(6)]),
    "corrupt in another class": loads(lambda case: case.write("dog/0.png", b"")),
    "another name than its format": loads(lambda case: case.write("bee/x.png", encoded(plain("bee"), "JPEG"))),
    "notes and hidden files": loads(
        lambda case: [case.write(p, b"x") for p in ("notes.txt", "bee/.x.png", ".git/a/0.png", "bee/n.csv")]
    ),
    "pipe": pipe,
    "dangling link": dangling,
    "label out of range": lambda case: case.odd_row("train", label=7),
    "label out of range in test": lambda case: case.odd_row("test", label=3),
    "label -1": lambda case: case.odd_row("train", label=-1),
    "no label": lambda case: case.odd_row("train", label=None),
    "no image": lambda case: case.odd_row("train", image=None),
    "empty image": lambda case: case.odd_row("test", image={"bytes": b"", "path": None}),
    "neither bytes nor path": lambda case: case.odd_row("train", image={"bytes": None, "path": None}),
    "path to nothing": lambda case: case.odd_row("train", image={"bytes": None, "path": "gone.png"}),
    "no number": lambda case: case.odd_row("train", INTEGERS, class_number, label=None),
    "negative number": lambda case: case.odd_row("train", INTEGERS, class_number, label=-1),
    "not a number": lambda case: case.odd_row("train", FLOATS, class_number, label=float("nan")),
    "no string": lambda case: case.odd_row("train", STRINGS, str, label=None),
    "empty string": lambda case: case.odd_row("test", STRINGS, str, label=""),
    "class lists of splits": lambda case: swapped(case, "train", "test"),
    "empty split": lambda case: (case.parquet("train", case.rows()), case.parquet("test", [])),
}
