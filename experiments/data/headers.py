"""What an encoded image says of itself: its size, before a decoder makes room for it.

A header may lie: twenty kilobytes can ask for gigabytes, or for hours.
"""

import io
import re
from collections.abc import Callable
from typing import TypeVar

import simplejpeg
from PIL import Image, UnidentifiedImageError

__all__ = ["MAX_PIXELS", "START_OF_JPEG", "BrokenImage", "by_pillow", "size_of"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow has others, too: PS
MAX_PIXELS = 64_000_000
MOST_SCANS = 100  # of a JPEG, each a walk over the whole image; 10 are usual
START_OF_JPEG = b"\xff\xd8\xff"
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # that has a length, or ends it
SCAN, END = 0xDA, 0xD9
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF

T = TypeVar("T")

Image.MAX_IMAGE_PIXELS = None  # callers have a limit of their own


class BrokenImage(ValueError):  # noqa: N818  it names the image, not the mistake
    """Bytes that are no image, or not all of one, or one that is too large."""


def size_of(encoded: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width, from the header.

    Raises:
        BrokenImage: If there is no header, or it asks for too much.
    """
    if encoded.startswith(START_OF_JPEG):
        _check_scans(encoded)
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded, strict=False)
        except (ValueError, KeyError):
            pass  # Pillow has to try
        else:
            return _checked(height, width, max_pixels)
    if encoded.startswith(b"RIFF"):  # Pillow makes room for the image to open it
        _checked(*_webp_size(encoded), max_pixels)

    def asked(image: Image.Image) -> tuple[int, int]:
        tags = getattr(image, "tag_v2", {})
        _checked(tags.get(TILE_LENGTH, 0), tags.get(TILE_WIDTH, 0), max_pixels)
        return _checked(image.height, image.width, max_pixels)

    return by_pillow(encoded, asked)


def by_pillow(encoded: bytes, use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of the image, which it gets before it is decoded.

    Raises:
        BrokenImage: If it is no image, and for whatever Pillow finds wrong with it.
    """
    try:  # a context manager would keep what failed until garbage is collected
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            return use(image)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"no whole {', '.join(FORMATS[:-1])} or TIFF") from None
    except Exception as error:  # damaged files make Pillow raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenImage(reason[:100]) from None


def _checked(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    if height * width > max_pixels:
        raise BrokenImage(
            f"says {width} x {height} pixels, more than config.data.max_pixels "
            f"{max_pixels:,}"
        )
    return height, width


def _check_scans(encoded: bytes) -> None:
    """Refuses a JPEG that is walked over without an end."""
    if encoded.count(bytes([0xFF, SCAN])) <= MOST_SCANS:
        return
    at = scans = 0
    while found := MARKER.search(encoded, at):
        at, marker = found.end(), encoded[found.end() - 1]
        if marker == END:
            break
        scans += marker == SCAN
        at += int.from_bytes(encoded[at : at + 2])
    if scans > MOST_SCANS:
        raise BrokenImage(f"has {scans:,} scans, more than {MOST_SCANS}")


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of a WebP; 0 if it is something else."""
    kind, body = encoded[12:16], encoded[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        width, height = (int.from_bytes(body[i : i + 3], "little") for i in (4, 7))
        return height + 1, width + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = (int.from_bytes(body[i : i + 2], "little") for i in (6, 8))
    return (height & 0x3FFF, width & 0x3FFF) if kind == b"VP8 " else (0, 0)
