"""Pictures of any size and format as RGB arrays of 32x32x3."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from resgrid.config import Resize
from resgrid.data.dataset import SIDE
from resgrid.errors import ResgridError
from resgrid.filetype import START_BYTES, identify_bytes, picture_formats

UNREAD_SUFFIXES = (".heic", ".heif")  # of pictures that Pillow does not read: better named than passed over
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel or less
MAX_PIXELS = 208_000_000  # of one picture, which then takes 0.6 GB; the largest of phones have 201 million
MAX_PIXELS_VARIABLE = "RESGRID_MAX_PIXELS"


def picture_suffixes() -> set[str]:
    """The suffixes of pictures that Pillow reads here, and of those that it is asked for in vain."""
    known = picture_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in known}.union(
        UNREAD_SUFFIXES
    )


def max_pixels() -> int:
    """Of one picture, as the environment says; raises ResgridError for a value that is no number."""
    given = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not given.isdecimal() or not int(given):
        raise ResgridError(f"{MAX_PIXELS_VARIABLE}={given}: give a number of pixels, such as {MAX_PIXELS}.")
    return int(given)


@contextmanager
def large_pictures() -> Iterator[list[str]]:
    """Pictures up to `max_pixels` are read, and no warning of Pillow's shows; gives a note on large ones."""
    notes: list[str] = []
    usual, limit = Image.MAX_IMAGE_PIXELS, max_pixels()
    Image.MAX_IMAGE_PIXELS = limit // 2  # Pillow warns above it, and refuses above twice as much
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", Image.DecompressionBombWarning)
            yield notes
    finally:
        Image.MAX_IMAGE_PIXELS = usual
    if caught:
        notes.append(
            f"pictures of more than {limit // 2:,} pixels, each of which takes much memory: {len(caught):,} "
            f"({MAX_PIXELS_VARIABLE}={limit} is the limit)"
        )


class BrokenPicture(ResgridError):
    """One picture that cannot be read, and why."""


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """The picture in `file`, of a format that its content shows or, for the few that have no signature, its
    name. Raises what Pillow's decoders raise.
    """
    Image.init()
    named = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    formats = [each for each in picture_formats() if Image.OPEN[each][1] or each == named]
    return Image.open(file, formats=formats)


def decode(file: IO[bytes], origin: str, resize: Resize) -> NDArray[np.uint8]:
    """A picture as (32, 32, 3): upright by EXIF, transparent parts on black.

    What only says something of the picture, such as a broken text or profile, does not stop it.
    Raises BrokenPicture, which names `origin`, for one that is broken or has more than 8 bits a channel.
    """
    try:
        try:
            image = _upright(file, origin)
        except Exception as cause:
            file.seek(0)
            try:
                image = _upright(io.BytesIO(_without_metadata(file.read())), origin)
            except Exception:
                raise cause from None
        if image.mode not in MODES:
            raise ValueError(f"pixels of type {image.mode}: save it with 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.asarray(to_square(image.convert("RGB"), resize))
    except Exception as error:  # a broken file raises whatever its decoder came upon, from a dozen types
        file.seek(0)
        kind = identify_bytes(file.read(START_BYTES))
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason = f"{reason.partition(',')[0]}: {MAX_PIXELS_VARIABLE} sets another one"
        elif not kind.is_picture:
            reason = f"it is {kind.name}. {kind.advice}"
        raise BrokenPicture(f"{origin} cannot be read as an image ({reason.rstrip('. ')})") from None


def _upright(file: IO[bytes], name: str) -> Image.Image:
    with open_picture(file, name) as opened:
        opened.load()
        try:
            return ImageOps.exif_transpose(opened)
        except Exception:  # EXIF is read anew there, and broken in many ways; the pixels are sound
            return opened.copy()


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
