"""Encoded images to pixels: JPEG by libjpeg-turbo, what else there is by Pillow.

A crop costs less than its image. Of a JPEG, the rows below the crop are not decoded,
colour that was stored at half the resolution is repeated, not interpolated, the cosine
transform is libjpeg-turbo's fast one (off by a level of 255 at quality 100), and a crop
of at least twice the wanted size is decoded at 1/2, 1/4 or 1/8 of its size. Other
formats are decoded whole, and averaged over blocks to the same end. The rest of the way
to the wanted size, less than a factor of two, is linear interpolation.

EXIF orientation is not looked at.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data.headers import MAX_PIXELS, START_OF_JPEG, BrokenImage, by_pillow, size_of

__all__ = ["BrokenImage", "decode", "random_resized_crop", "resized_centre"]

CENTRE = 224 / 256  # share of the shorter side that evaluation looks at
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
COLOURS = {1: "GRAY", 3: "RGB"}  # simplejpeg's, by channels
BASELINE, SCAN, RESTARTS = (0xC0, 0xC1), 0xDA, 0xDD  # markers of segments in a JPEG
DAMAGE = ("Corrupt JPEG data", "Premature end")  # how libjpeg-turbo's words begin
SMALLEST = 8  # a JPEG is decoded at 1/8 of its size, or more

cv2.setNumThreads(0)  # callers have processes and threads of their own


class Box(NamedTuple):
    """A part of an image, in pixels from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float


def decode(encoded: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The whole image.

    Args:
        encoded: Contents of an image file.
        channels: 1 for grey, 3 for RGB, whatever the file holds.
        max_pixels: The most that an image may have, by its header.

    Returns:
        uint8 [H, W, channels].

    Raises:
        BrokenImage: If the bytes are no image, or not all of one, or too large.
    """
    return _read(encoded, channels, *size_of(encoded, max_pixels))


def random_resized_crop(
    encoded: bytes,
    channels: int,
    size: int,
    rng: np.random.Generator,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, resized.

    Args:
        encoded: Contents of an image file.
        channels: 1 for grey, 3 for RGB, whatever the file holds.
        size: Height and width of the result.
        rng: Draws the part, which depends on nothing else but the image's size.
        max_pixels: The most that an image may have, by its header.

    Returns:
        uint8 [size, size, channels].

    Raises:
        BrokenImage: If the bytes are no image, or not all of one, or too large.
    """
    height, width = size_of(encoded, max_pixels)
    box = _random_box(height, width, rng) or _centre_box(height, width)
    return _resized(encoded, channels, height, width, box, size)


def resized_centre(
    encoded: bytes, channels: int, size: int, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The central square, with a margin cut off, resized.

    An image that has the wanted size already is returned as it is.

    Args:
        encoded: Contents of an image file.
        channels: 1 for grey, 3 for RGB, whatever the file holds.
        size: Height and width of the result.
        max_pixels: The most that an image may have, by its header.

    Returns:
        uint8 [size, size, channels].

    Raises:
        BrokenImage: If the bytes are no image, or not all of one, or too large.
    """
    height, width = size_of(encoded, max_pixels)
    if (height, width) == (size, size):
        return _read(encoded, channels, height, width)
    box = _centre_box(height, width)
    return _resized(encoded, channels, height, width, box, size)


def _random_box(height: int, width: int, rng: np.random.Generator) -> Box | None:
    """Ten tries at a random area, aspect ratio and place."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return Box(left, top, left + w, top + h)
    return None


def _centre_box(height: int, width: int) -> Box:
    side = min(height, width) * CENTRE
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side)


def _resized(
    encoded: bytes, channels: int, height: int, width: int, box: Box, size: int
) -> np.ndarray:
    """A part of an image of known size, resized to a square."""
    side = min(box.right - box.left, box.bottom - box.top)
    factor = 2 ** max(0, math.floor(math.log2(side / size)))
    rows = math.ceil(box.bottom / factor) * factor
    pixels = _read(encoded, channels, height, width, factor, rows)
    return _interpolate(pixels, Box(*(edge / factor for edge in box)), size)


def _interpolate(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Pixels in between others, at the centres of a grid over the box."""
    left, top = math.floor(box.left), math.floor(box.top)
    part = pixels[top : math.ceil(box.bottom), left : math.ceil(box.right)]
    if all(edge == round(edge) for edge in box):
        resized = cv2.resize(part, (size, size))  # the same as below, but faster
    else:
        dx, dy = (box.right - box.left) / size, (box.bottom - box.top) / size
        x, y = box.left - left + (dx - 1) / 2, box.top - top + (dy - 1) / 2
        resized = cv2.warpAffine(
            part,
            np.array([[dx, 0, x], [0, dy, y]]),
            (size, size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    return resized.reshape(size, size, -1)


def _read(
    encoded: bytes,
    channels: int,
    height: int,
    width: int,
    factor: int = 1,
    rows: int | None = None,
) -> np.ndarray:
    """The pixels of an image of known size, at a fraction of that size.

    Args:
        encoded: Contents of an image file.
        channels: 1 for grey, 3 for RGB.
        height: Of the image in the file.
        width: Of the image in the file.
        factor: How many times smaller the result is: a power of two.
        rows: For a crop, how many of the image's rows it needs; there may be more.

    Returns:
        uint8 [at least rows / factor, width / factor, channels], rounded up.
    """
    if encoded.startswith(START_OF_JPEG):
        scale = min(factor, SMALLEST)
        pixels = _read_jpeg(encoded, channels, height, width, scale, rows)
        if pixels is not None:
            return _averaged(pixels, factor // scale)
    mode = MODES[channels]
    pixels = by_pillow(encoded, lambda x: _converted(x, height, width, mode))
    return _averaged(pixels.reshape(*pixels.shape[:2], channels), factor)


def _averaged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The means of square blocks of pixels."""
    if factor == 1:
        return pixels
    image = Image.fromarray(pixels if pixels.shape[-1] > 1 else pixels[..., 0])
    means = np.asarray(image.reduce(factor))
    return means.reshape(*means.shape[:2], pixels.shape[-1])


def _read_jpeg(
    encoded: bytes, channels: int, height: int, width: int, scale: int, rows: int | None
) -> np.ndarray | None:
    """The same at 1, 1/2, 1/4 or 1/8 of the size, or None if Pillow has to try."""
    cut = _cut_below(encoded, rows) if rows and rows < height else None
    height = rows if rows and cut else height
    shape = (math.ceil(height / scale), math.ceil(width / scale))
    pixels = np.empty((*shape, channels), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            cut or encoded,
            COLOURS[channels],
            fastdct=rows is not None,
            fastupsample=rows is not None,
            min_height=shape[0],
            min_width=shape[1],
            min_factor=scale,
            buffer=pixels,
        )
    except ValueError as error:
        reason = str(error)  # the first thing that libjpeg-turbo noticed
        if cut and "extraneous bytes" in reason:
            return pixels  # those of the rows below: all others have been read
        if reason.startswith(DAMAGE) and "extraneous bytes" not in reason:
            raise BrokenImage(reason) from None
        return None
    return pixels


def _cut_below(encoded: bytes, rows: int) -> bytes | None:
    """A JPEG whose header speaks of so many rows only, so that no more are decoded.

    Returns:
        The JPEG, or None if its rows do not simply follow one another, from top to
        bottom: if it is progressive, for example, or no JPEG.
    """
    at, frame = 2, 0
    while encoded[at : at + 1] == b"\xff" and at + 9 < len(encoded):
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4])
        if marker in BASELINE:
            frame = at
        elif marker == RESTARTS:
            return None
        elif marker == SCAN:
            all_colours = frame and encoded[at + 4] == encoded[frame + 9]
            height = slice(frame + 5, frame + 7)
            return _replaced(encoded, height, rows) if all_colours else None
        at += 2 + length
    return None


def _replaced(encoded: bytes, place: slice, number: int) -> bytes:
    """The bytes with another number of two bytes in one place."""
    return encoded[: place.start] + number.to_bytes(2) + encoded[place.stop :]


def _converted(image: Image.Image, height: int, width: int, mode: str) -> np.ndarray:
    """The pixels in a mode of Pillow's, of an image that has the size that it said."""
    if image.size != (width, height):
        raise BrokenImage("has two sizes")
    image = _eight_bits(image)
    return np.array(image if image.mode == mode else image.convert(mode))


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of a mode that converts to grey and RGB without loss of sense."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        high = np.asarray(image) >> 8
        return Image.fromarray(high.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        return image.convert("RGBA")
    return image
