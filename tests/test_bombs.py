"""Files that ask for too much, or for another program: refused by what they say."""

import contextlib
import gc
import io
import pathlib
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from data import decoding, headers
from data.decoding import BrokenImage, decode, random_resized_crop, resized_centre

LARGE = 16_000  # pixels, height and width: WebP allows no more than 16,383
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def encoded(kind, pixels=PIXELS, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


ANIMATED = {"save_all": True, "append_images": [Image.fromarray(PIXELS[::-1].copy())]}


def put(contents, place, *numbers):
    """The bytes with other ones at a place: those numbers of some sizes, in bytes."""
    new = b"".join(n.to_bytes(size, order) for n, size, order in numbers)
    return contents[:place] + new + contents[place + len(new) :]


def jpeg(height, width, **options):
    """A JPEG whose header says that it has this size."""
    contents = encoded("JPEG", **options)
    frame = contents.index(b"\xff\xc2" if options else b"\xff\xc0")
    return put(contents, frame + 5, (height, 2, "big"), (width, 2, "big"))


def png(height, width):
    header = struct.pack(">II5B", width, height, 8, 0, 0, 0, 0)

    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


def webp(height, width, **options):
    contents = encoded("WEBP", **options)
    if "save_all" in options:
        place = contents.index(b"VP8X") + 12
        return put(contents, place, *((n - 1, 3, "little") for n in (width, height)))
    if "lossless" in options:
        place = contents.index(b"VP8L") + 9
        return put(contents, place, (width - 1 | height - 1 << 14, 4, "little"))
    place = contents.index(b"\x9d\x01\x2a") + 3
    return put(contents, place, *((n, 2, "little") for n in (width, height)))


def gif(height, width, place):
    contents = encoded("GIF", PIXELS[..., 0])
    return put(contents, place, *((n, 2, "little") for n in (width, height)))


def bmp(height, width):
    size = width.to_bytes(4, "little") + height.to_bytes(4, "little", signed=True)
    contents = encoded("BMP")
    return contents[:18] + size + contents[26:]


def tiff(height, width, tile=0):
    """An image of zeros, in one strip or in tiles."""
    strip = {278: height, 273: 200, 279: 600}
    tiles = {322: tile, 323: tile, 324: 200, 325: 600}
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1}
    tags = sorted((tags | (tiles if tile else strip)).items())
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return start.ljust(200, b"\0") + bytes(600)


FRAME = b",\0\0\0\0"  # of a GIF, at its corner

BOMBS = {
    "JPEG": jpeg(LARGE, LARGE),
    "JPEG, progressive": jpeg(LARGE, LARGE, progressive=True),
    "PNG": png(LARGE, LARGE),
    "PNG, wide": png(1, LARGE**2),
    "WebP": webp(LARGE, LARGE),
    "WebP, lossless": webp(LARGE, LARGE, lossless=True),
    "WebP, animated": webp(LARGE, LARGE, **ANIMATED),
    "WebP, canvas": webp(2**23, 2**23, **ANIMATED),
    "GIF, screen": gif(LARGE, LARGE, 6),
    "GIF, frame": gif(LARGE, LARGE, encoded("GIF", PIXELS[..., 0]).index(FRAME) + 5),
    "BMP": bmp(LARGE, LARGE),
    "BMP, upside down": bmp(-LARGE, LARGE),
    "TIFF": tiff(LARGE, LARGE),
    "TIFF, tile": tiff(20, 30, tile=LARGE),
}


def read(contents, max_pixels=headers.MAX_PIXELS):
    """By each of the three functions: the pixels, or the reason against it."""
    results = []
    for call in (
        lambda: decode(contents, 3, max_pixels),
        lambda: resized_centre(contents, 3, 8, max_pixels),
        lambda: random_resized_crop(
            contents, 3, 8, np.random.default_rng(0), max_pixels
        ),
    ):
        try:
            results.append(call())
        except BrokenImage as error:
            results.append(str(error))
    return results


@pytest.mark.parametrize("name", BOMBS)
def test_what_says_that_it_is_too_large_is_refused(name):
    odd = {"PNG, wide": (1, LARGE**2), "WebP, canvas": (2**23, 2**23)}
    height, width = odd.get(name, (LARGE, LARGE))
    assert read(BOMBS[name]) == 3 * [
        f"says {width} x {height} pixels, more than config.data.max_pixels 64,000,000"
    ]


def test_refusing_takes_no_memory():
    """Nor does another way to say it: in a process, for what others took counts."""
    program = (
        "import resource, sys, test_bombs as bombs\n"
        "bombs.read(bombs.encoded('PNG'))\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "for contents in bombs.BOMBS.values():\n"
        "    bombs.read(contents)\n"
        "print((used() - before) * (1 if sys.platform == 'darwin' else 1024))\n"
    )
    paths = pathlib.Path(decoding.__file__).parents[1], pathlib.Path(__file__).parent
    start = f"import sys; sys.path[:0] = {[str(path) for path in paths]}\n"
    run = subprocess.run(
        [sys.executable, "-c", start + program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 50e6  # one byte a pixel would be five times as much


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_limit_is_on_pixels(kind):
    contents = encoded(kind)
    for result in read(contents, 60 * 80):
        assert isinstance(result, np.ndarray)
    assert read(contents, 60 * 80 - 1) == 3 * [
        "says 80 x 60 pixels, more than config.data.max_pixels 4,799"
    ]


def test_what_may_be_large_is_read_without_a_limit_of_pillows_own(monkeypatch):
    contents = encoded("PNG", np.zeros((1000, 3000), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert all("could be decompression bomb" in result for result in read(contents))
    monkeypatch.undo()
    assert decode(contents, 1).shape == (1000, 3000, 1)
    assert Image.MAX_IMAGE_PIXELS is None


def with_scans(number):
    """A JPEG in which nothing follows but one scan after another."""
    contents = encoded("JPEG", progressive=True)
    start = contents.index(b"\xff\xda")
    end = contents.index(b"\xff\xc4", start)  # the tables of the second scan
    return contents[:start] + number * contents[start:end] + contents[end:]


def test_a_jpeg_of_endless_scans_is_refused():
    assert read(with_scans(5000)) == 3 * ["has 5,009 scans, more than 100"]
    assert "scans" not in read(with_scans(80))[0]
    comment = encoded("JPEG", comment=b"\xff\xda" * 200)
    assert decode(comment, 3).shape == (60, 80, 3)
    trailing = encoded("JPEG") + b"\0\0" + b"\xff\xda\0\2" * 200
    assert decode(trailing, 3).shape == (60, 80, 3)


def test_a_jpeg_of_two_sizes_is_refused_by_either():
    """Of two frames, libjpeg believes the first, and Pillow the second."""
    small, large = (encoded("JPEG"), BOMBS["JPEG"])
    frame = slice(small.index(b"\xff\xc0"), small.index(b"\xff\xc4"))
    for first, second in ((small, large), (large, small)):
        both = first[: frame.stop] + second[frame] + first[frame.stop :]
        assert all(isinstance(result, str) for result in read(both))


def test_an_image_of_another_size_than_it_said_is_refused():
    with pytest.raises(BrokenImage, match="has two sizes"):
        decoding._read(encoded("PNG"), 3, 60, 81)


OTHERS = ["EPS", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "PDF"]


@pytest.mark.parametrize("kind", OTHERS)
def test_formats_that_are_not_meant_are_no_images(kind, monkeypatch):
    """One of Pillow's starts a program, which nobody wants of a data set."""
    contents = encoded(kind)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    assert read(contents) == 3 * ["no whole JPEG, PNG, WEBP, GIF, BMP or TIFF"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_broken_image_is_not_kept_until_garbage_is_collected(kind):
    contents = encoded(kind)[:-2000]

    def images():
        return sum(issubclass(type(x), Image.Image) for x in gc.get_objects())

    read(contents)
    gc.collect()
    gc.disable()
    try:
        before = images()
        assert all(isinstance(result, str) for result in read(contents))
        assert images() == before
    finally:
        gc.enable()


# Anything at all.


GOOD = [
    encoded("JPEG"),
    encoded("JPEG", progressive=True),
    encoded("JPEG", restart_marker_blocks=2),
    encoded("JPEG", PIXELS[..., 0]),
    encoded("PNG"),
    encoded("PNG", PIXELS[..., 0].astype(np.uint16) * 200),
    encoded("GIF", PIXELS[..., 0], **ANIMATED),
    encoded("WEBP"),
    encoded("WEBP", lossless=True),
    encoded("WEBP", **ANIMATED),
    encoded("BMP"),
    encoded("BMP", PIXELS[..., 0]),
    *(encoded("TIFF", compression=x) for x in (None, "tiff_lzw", "jpeg", "packbits")),
    tiff(20, 30, tile=16),
]


def damaged(contents, rng):
    """The bytes with a few of them changed, lost, doubled or taken from another."""
    contents = bytearray(contents)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(min(len(contents), rng.choice([60, 600, 10**6])))
        other = rng.choice(GOOD)
        start = rng.randrange(len(other))
        kind, count = rng.randrange(6), rng.randrange(1, 50)
        if kind < 2:
            contents[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            contents[place : place + 4] = rng.choice(
                [b"\xff" * 4, b"\0" * 4, b"\7\xd0"]
            )
        elif kind == 3:
            del contents[place + 1 : place + count]
        elif kind == 4:
            contents[place:place] = other[start : start + count]
        else:
            del contents[-count:]
        contents = contents or bytearray(b"\0")
    return bytes(contents)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own, of odd tags
def test_damaged_files_give_an_image_or_a_reason(seed):
    rng = random.Random(seed)
    contents = damaged(rng.choice(GOOD), rng)
    whole, *parts = read(contents, max_pixels=10**6)
    for result in (whole, *parts):
        if isinstance(result, str):
            assert 0 < len(result) < 120
            assert "\n" not in result
            continue
        assert result.dtype == np.uint8
        assert result.shape[2] == 3
        assert result.size <= 3 * 10**6
    for part in parts:
        assert isinstance(part, str) or part.shape == (8, 8, 3)
    with contextlib.suppress(BrokenImage):
        assert len(headers.size_of(contents, 10**6)) == 2
