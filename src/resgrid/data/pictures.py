"""Pictures of any size and format as RGB arrays of 32x32x3."""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
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


class Remark(StrEnum):
    """What a person should know of a picture that was read."""

    SEVERAL_PAGES = "have several pages or frames, of which the first is taken"
    TRANSPARENT = "are transparent in places, which become white"
    ONE_COLOUR = "become a single colour when their transparent places become white"


@dataclass(frozen=True)
class Picture:
    pixels: NDArray[np.uint8]  # (32, 32, 3)
    size: tuple[int, int]  # width and height before
    remarks: tuple[Remark, ...]


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

    What only says something of the picture, such as a broken text or profile, does not stop it.
    Raises BrokenPicture, which names `origin`, for one that is broken or has more than 8 bits a channel.
    """
    with _quiet_pillow() as logged:
        try:
            try:
                image, has_several_pages = _upright(file, origin)
            except Exception as cause:
                file.seek(0)
                try:
                    image, has_several_pages = _upright(io.BytesIO(_without_metadata(file.read())), origin)
                except Exception:
                    raise cause from None
            if image.mode not in MODES:
                raise ValueError(f"pixels of type {image.mode}: save it as RGB with 8 bits a channel")
            remarks = [Remark.SEVERAL_PAGES] * has_several_pages
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema() != (255, 255):
                    remarks.append(Remark.TRANSPARENT)
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(to_square(image.convert("RGB"), resize))
        except Exception as error:  # a broken file raises whatever its decoder came upon, of a dozen types
            raise BrokenPicture(origin, _reason(file, error, logged)) from None
    if Remark.TRANSPARENT in remarks and (pixels == pixels[0, 0]).all():
        remarks.append(Remark.ONE_COLOUR)
    return Picture(pixels, image.size, tuple(remarks))


def _reason(file: IO[bytes], error: Exception, logged: list[logging.LogRecord]) -> str:
    file.seek(0)
    if known := confusion(file.read(START_BYTES)):
        return f"it is {known}"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels: make it smaller"
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
    formats = picture_formats()
    named = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    formats = tuple(each for each in formats if Image.OPEN[each][1] or each == named)
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


def _without_metadata(content: bytes) -> bytes:
    """A PNG without its ancillary chunks, a JPEG without its application segments, anything else as it is.

    What the pixels are drawn by stays: transparency, EXIF's orientation, Adobe's colour transform.
    """
    is_png = content.startswith(b"\x89PNG")
    if not is_png and not content.startswith(b"\xff\xd8\xff"):
        return content
    at = 8 if is_png else 2
    kept = [content[:at]]
    while (head := content[at : at + 16]) and (is_png or (head[:1] == b"\xff" and head[1:2] != b"\xda")):
        if is_png:
            end = at + 12 + int.from_bytes(head[:4], "big")
            keep = head[4:5].isupper() or head[4:8] in (b"tRNS", b"eXIf")
        else:  # up to the scan
            end = at + 2 + int.from_bytes(head[2:4], "big")
            is_adobe = head[4:9] == b"Adobe" and end - at > 15
            keep = (
                not re.match(rb".[\xe0-\xef\xfe]", head, re.DOTALL) or head[4:10] == b"Exif\0\0" or is_adobe
            )
        if keep:
            kept.append(content[at:end])
        at = max(end, at + 2)
    return b"".join([*kept, content[at:]])


def to_square(image: Image.Image, resize: Resize) -> Image.Image:
    """`image` at 32x32, bilinear with antialiasing: `stretch` gives up its shape, `crop` what is outside of
    the square in the middle, `pad` puts black on two sides.
    """
    if image.size == (SIDE, SIDE):
        return image
    bilinear = Image.Resampling.BILINEAR
    match resize:
        case "stretch":
            return image.resize((SIDE, SIDE), bilinear)
        case "crop":
            return ImageOps.fit(image, (SIDE, SIDE), bilinear)
        case "pad":
            scale = SIDE / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            square = Image.new(image.mode, (SIDE, SIDE))
            square.paste(image.resize((width, height), bilinear), ((SIDE - width) // 2, (SIDE - height) // 2))
            return square
