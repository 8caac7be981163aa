"""Pictures of any size and format as RGB arrays of 32x32x3."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from pathlib import PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from resgrid.config import Resize
from resgrid.data.dataset import SIDE
from resgrid.errors import ResgridError
from resgrid.filetype import START_BYTES, confusion

UNREADABLE = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow formats that need another program
UNREAD_SUFFIXES = (".heic", ".heif")  # of pictures that Pillow does not read: better named than passed over
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel or less
MAX_PIXELS = 208_000_000  # of one picture, which then takes 0.6 GB; the largest of phones have 201 million

# What a person should know of a picture that was read.
SEVERAL_PAGES = "have several pages or frames, of which the first is taken"
TRANSPARENT = "are transparent in places, which become white"


@dataclass(frozen=True)
class Picture:
    pixels: NDArray[np.uint8]  # (32, 32, 3)
    size: tuple[int, int]  # width and height before
    remarks: tuple[str, ...]


class BrokenPicture(ResgridError):
    """One picture that cannot be read; `reason` is the library's own where it has one."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin} cannot be read as an image ({reason})")
        self.reason = reason


def picture_formats() -> tuple[str, ...]:
    """The formats that Pillow reads here without another program."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in UNREADABLE)


def picture_suffixes() -> set[str]:
    """The suffixes of pictures that Pillow reads here, and of those that it is asked for in vain."""
    known = picture_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in known}.union(
        UNREAD_SUFFIXES
    )


def is_picture(start: bytes) -> bool:
    """By the signatures that Pillow's own readers look for."""
    for name in picture_formats():
        _, accepts = Image.OPEN[name]
        try:
            if accepts is not None and accepts(start[:16]):
                return True
        except (IndexError, ValueError, struct.error):  # shorter than the signature
            continue
    return False


def read_picture(file: IO[bytes], origin: str, resize: Resize) -> Picture:
    """A picture upright by EXIF, transparent parts on white, of several pages or frames the first.

    Raises BrokenPicture, which names `origin`, for one that is broken or has more than 8 bits a channel.
    """
    with _quiet_pillow() as logged:
        try:
            try:
                image, has_several_pages = _upright(file, origin)
            except Exception:  # of a text or a colour profile, say, which the pixels do not need
                file.seek(0)
                image, has_several_pages = _upright(io.BytesIO(_essential(file.read())), origin)
            if image.mode not in MODES:
                raise ValueError(f"pixels of type {image.mode}: save it as RGB with 8 bits a channel")
            remarks = [SEVERAL_PAGES] * has_several_pages
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema() != (255, 255):
                    remarks.append(TRANSPARENT)
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(to_square(image.convert("RGB"), resize))
        except Exception as error:  # a broken file raises whatever its decoder came upon, of a dozen types
            raise BrokenPicture(origin, _reason(file, error, logged)) from None
    return Picture(pixels, image.size, tuple(remarks))


def _reason(file: IO[bytes], error: Exception, logged: list[logging.LogRecord]) -> str:
    file.seek(0)
    if known := confusion(file.read(START_BYTES)):
        return f"it is {known}"
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        return ": ".join(["cannot identify image file", *(record.getMessage() for record in logged[-1:])])
    return str(error).rstrip(". ") or type(error).__name__


@contextmanager
def _quiet_pillow() -> Iterator[list[logging.LogRecord]]:
    """Pictures up to MAX_PIXELS are read and none of Pillow's warnings shows; gives what it logs."""
    usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2  # it refuses above twice as much
    handler = BufferingHandler(capacity=1000)
    handler.setLevel(logging.WARNING)
    logging.getLogger("PIL").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield handler.buffer
    finally:
        Image.MAX_IMAGE_PIXELS = usual
        logging.getLogger("PIL").removeHandler(handler)


def _upright(file: IO[bytes], name: str) -> tuple[Image.Image, bool]:
    """The first page of the picture in `file`, and whether there are others.

    Its format is told by its content or, for the few that have no signature, by its name.
    """
    named = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    formats = [each for each in picture_formats() if Image.OPEN[each][1] or each == named]
    with Image.open(file, formats=formats) as opened:
        opened.load()
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:  # EXIF is read anew there, and broken in many ways; the pixels are sound
            image = opened.copy()
        try:  # the second picture in a photograph (MPO) is a preview or a map of depths
            has_several_pages = opened.format != "MPO" and bool(getattr(opened, "is_animated", False))
        except Exception:  # the second page is broken
            has_several_pages = True
        return image, has_several_pages


def _essential(content: bytes) -> bytes:
    """A PNG without the chunks that its pixels, transparency and orientation do not need."""
    if not content.startswith(b"\x89PNG"):
        return content
    chunks, at = [content[:8]], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            chunks.append(content[at:end])
        at = end
    return b"".join(chunks)


def to_square(image: Image.Image, resize: Resize) -> Image.Image:
    """`image` at 32x32, bilinear with antialiasing: `stretch` gives up its shape, `crop` what is outside of
    the square in the middle, `pad` puts black on two sides.
    """
    bilinear = Image.Resampling.BILINEAR
    match resize:
        case "stretch":
            return image.resize((SIDE, SIDE), bilinear)
        case "crop":
            return ImageOps.fit(image, (SIDE, SIDE), bilinear)
        case "pad":  # ImageOps.pad rounds half a pixel to even, and loses a picture of 1x500
            scale = SIDE / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            square = Image.new(image.mode, (SIDE, SIDE))
            square.paste(image.resize((width, height), bilinear), ((SIDE - width) // 2, (SIDE - height) // 2))
            return square
