"""Pixels from encoded images: the right part, of odd files too; broken ones refused."""

import concurrent.futures
import contextlib
import io
import math
from unittest import mock

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import decoding, headers
from data.decoding import BrokenImage, decode, random_resized_crop, resized_centre

SIZES = st.integers(1, 150)
SEEDS = st.integers(0, 2**32)
CHANNELS = st.sampled_from([1, 3])


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture without fine detail, with another colour at each place."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None] / 40
    waves = [
        np.sin(
            rng.uniform(-1, 1, 3) * y + rng.uniform(-1, 1, 3) * x + rng.uniform(0, 6)
        )
        for _ in range(3)
    ]
    return (127 + 40 * sum(waves)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    options = {"quality": 95} | options if kind == "JPEG" else options
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def by_pillow(
    contents: bytes, channels: int, box: tuple[float, ...] | None = None, size: int = 0
) -> np.ndarray:
    image = Image.open(io.BytesIO(contents)).convert({1: "L", 3: "RGB"}[channels])
    if box is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return np.asarray(image).reshape(image.height, image.width, channels)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b).mean())


# The part of the image.


@given(SIZES, SIZES, SEEDS)
def test_random_box_is_a_part_of_allowed_area_and_aspect_ratio(height, width, seed):
    box = decoding._random_box(height, width, np.random.default_rng(seed))
    if box is None:
        return
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height
    assert all(isinstance(edge, int) for edge in box)
    w, h = box.right - box.left, box.bottom - box.top
    # Width and height are rounded: some pair within half a pixel is allowed.
    assert (w + 0.5) * (h + 0.5) >= 0.08 * height * width
    assert (w - 0.5) * (h - 0.5) <= height * width
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    assert (w - 0.5) / (h + 0.5) <= 4 / 3


def test_random_boxes_cover_the_limits_and_the_whole_image():
    rng = np.random.default_rng(0)
    boxes = np.array([decoding._random_box(300, 400, rng) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top) / (300 * 400)
    ratio = np.log((right - left) / (bottom - top))
    assert area.min() < 0.09
    assert area.max() > 0.95
    assert ratio.min() < math.log(0.76)
    assert ratio.max() > math.log(1.31)
    assert (left.min(), top.min(), right.max(), bottom.max()) == (0, 0, 400, 300)
    small = area < 0.3
    assert abs(((left + right) / 2)[small].mean() - 200) < 10
    assert abs(((top + bottom) / 2)[small].mean() - 150) < 10
    assert abs(ratio[small].mean()) < 0.02


def test_draws_depend_on_the_size_of_the_image_only():
    pixels = smooth(120, 160)
    left_at = set()
    for contents in (
        encoded(pixels),
        encoded(pixels, progressive=True),
        encoded(pixels[..., 0]),
        encoded(pixels, "PNG"),
    ):
        for size in (16, 64):
            rng = np.random.default_rng(3)
            random_resized_crop(contents, 3, size, rng)
            left_at.add(rng.integers(2**60))
    rng = np.random.default_rng(3)
    decoding._random_box(120, 160, rng)
    assert left_at == {rng.integers(2**60)}


def test_order_of_the_draws_is_the_one_that_runs_were_made_with():
    rng = np.random.default_rng(7)
    area = 300 * 400 * rng.uniform(0.08, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    x, y = rng.integers(400 - w + 1), rng.integers(300 - h + 1)
    box = decoding._random_box(300, 400, np.random.default_rng(7))
    assert box == (x, y, x + w, y + h)


def test_an_image_too_narrow_for_any_box_gives_its_centre():
    contents = encoded(smooth(20, 3000))
    crop = random_resized_crop(contents, 3, 16, np.random.default_rng(0))
    np.testing.assert_array_equal(crop, resized_centre(contents, 3, 16))


@given(
    SIZES, SIZES, CHANNELS, st.integers(1, 40), SEEDS, st.sampled_from(["JPEG", "PNG"])
)
@settings(deadline=None, max_examples=50)
def test_crops_are_square_and_the_same_for_the_same_generator(
    height, width, channels, size, seed, kind
):
    contents = encoded(smooth(height, width), kind)

    def crop():
        rng = np.random.default_rng(seed)
        return random_resized_crop(contents, channels, size, rng)

    first = crop()
    assert first.shape == (size, size, channels)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, crop())
    centre = resized_centre(contents, channels, size)
    assert centre.shape == (size, size, channels)
    assert centre.dtype == np.uint8


def test_a_cut_jpeg_is_decoded_down_to_the_cut_only(monkeypatch):
    contents, decoded = encoded(smooth(100, 90)), []
    whole = simplejpeg.decode_jpeg

    def decode_jpeg(*args, buffer, **options):
        decoded.append(buffer.shape)
        return whole(*args, buffer=buffer, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    decoding._resized(contents, 3, 100, 90, decoding.Box(0, 10, 30, 41), 30)
    decoding._resized(contents, 3, 100, 90, decoding.Box(0, 9, 32, 41), 16)
    assert decoded == [(41, 90, 3), (21, 45, 3)]


def test_other_seeds_give_other_crops():
    contents = encoded(smooth(120, 160))
    crops = [
        random_resized_crop(contents, 3, 8, np.random.default_rng(seed)).tobytes()
        for seed in range(10)
    ]
    assert len(set(crops)) == 10


def test_threads_give_what_one_thread_gives():
    contents = [encoded(smooth(100 + i, 150)) for i in range(16)]

    def crop(i):
        return random_resized_crop(contents[i], 3, 32, np.random.default_rng(i))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(crop, list(range(16)) * 4))
    for i, image in enumerate(together):
        np.testing.assert_array_equal(image, crop(i % 16))


# The pixels, next to Pillow's.


@st.composite
def boxes(draw):
    """An image's height and width, and a box of whole pixels, often at a border."""
    height, width = draw(st.integers(40, 200)), draw(st.integers(40, 200))
    w = draw(st.integers(20, min(width, 2 * height)))
    h = draw(st.integers(w // 2, min(height, 2 * w)))
    left = draw(st.sampled_from([0, width - w]) | st.integers(0, width - w))
    top = draw(st.sampled_from([0, height - h]) | st.integers(0, height - h))
    return height, width, decoding.Box(left, top, left + w, top + h)


@given(boxes(), CHANNELS, st.integers(8, 64), st.sampled_from([0, 1, 2]), st.booleans())
@settings(deadline=None, max_examples=150)
def test_a_resized_part_is_that_of_pillow(case, channels, size, subsampling, jpeg):
    height, width, box = case
    pixels = smooth(height, width, seed=height)
    contents = (
        encoded(pixels, subsampling=subsampling) if jpeg else encoded(pixels, "PNG")
    )
    part = decoding._resized(contents, channels, height, width, box, size)
    assert difference(part, by_pillow(contents, channels, box, size)) < 2.5


def ramps() -> np.ndarray:
    """Place told by colour: red grows to the right by 2 a pixel, green downwards."""
    y, x = np.mgrid[:128, :128] * 2
    return np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8)


def exactly(*args, fastdct, decode=simplejpeg.decode_jpeg, **options):
    """Without the fast transform, which darkens, and so would move a place."""
    assert isinstance(fastdct, bool)
    return decode(*args, fastdct=False, **options)


RAMPS = {
    "JPEG": encoded(ramps(), quality=100, subsampling=0),
    "PNG": encoded(ramps(), "PNG"),
}


@given(
    st.tuples(*[st.floats(0, 30)] * 2),
    st.tuples(*[st.floats(20, 98)] * 2),
    st.integers(16, 64),
    st.sampled_from(list(RAMPS)),
)
@settings(deadline=None, max_examples=100)
def test_a_resized_part_lies_where_the_box_says_to_a_fraction_of_a_pixel(
    corner, extent, size, kind
):
    box = decoding.Box(*corner, *(c + e for c, e in zip(corner, extent, strict=True)))
    with mock.patch.object(simplejpeg, "decode_jpeg", exactly):
        part = decoding._resized(RAMPS[kind], 3, 128, 128, box, size) / 2
    inner = slice(1, -1)  # a pixel at a border may lie outside of all centres
    centres = (np.arange(size) + 0.5)[inner] / size
    x = part[inner, inner, 0].mean(0) - (box.left + centres * extent[0] - 0.5)
    y = part[inner, inner, 1].mean(1) - (box.top + centres * extent[1] - 0.5)
    for error in (x, y):
        assert abs(error.mean()) < 0.3  # 8 bits round a place by up to 0.25
        assert np.abs(error).max() < 0.6


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize(
    "kind", [{}, {"progressive": True}, {"restart_marker_rows": 1}]
)
def test_rows_above_a_cut_are_those_of_the_whole_image(subsampling, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    contents = encoded(pixels, subsampling=subsampling, **kind)
    whole = simplejpeg.decode_jpeg(contents, fastdct=True, fastupsample=True)
    for rows in range(1, 91):
        box = decoding.Box(0, rows - 1, 70, rows)  # as it is: nothing is interpolated
        part = decoding._resized(contents, 3, 90, 70, box, 70)
        np.testing.assert_array_equal(part[0], whole[rows - 1])


def test_only_simple_jpegs_are_cut():
    pixels = smooth(90, 70)
    assert decoding._cut_below(encoded(pixels), 40) is not None
    assert decoding._cut_below(encoded(pixels[..., 0]), 40) is not None
    assert decoding._cut_below(encoded(pixels, progressive=True), 40) is None
    assert decoding._cut_below(encoded(pixels, restart_marker_rows=1), 40) is None
    contents = bytearray(encoded(pixels))
    contents[contents.index(b"\xff\xda") + 4] = 1  # the first scan has one colour only
    assert decoding._cut_below(bytes(contents), 40) is None
    for other in (b"", b"\xff\xd8\xff", encoded(pixels)[:200], encoded(pixels, "PNG")):
        assert decoding._cut_below(other, 40) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [9, 20, 40, 80, 160])
def test_a_much_smaller_image_is_averaged_not_sampled(size, kind):
    noise = np.random.default_rng(0).integers(0, 256, (400, 500), np.uint8)
    contents = encoded(noise, kind)
    box = decoding._centre_box(400, 500)
    part = resized_centre(contents, 1, size)
    reference = by_pillow(contents, 1, box, size)
    assert part.std() < 1.6 * reference.std() + 2
    assert abs(part.mean() - reference.mean()) < 2


@given(SIZES, SIZES, CHANNELS, st.sampled_from(["JPEG", "PNG"]))
@settings(deadline=None, max_examples=50)
def test_decoding_gives_the_pixels_of_pillow(height, width, channels, kind):
    contents = encoded(smooth(height, width), kind)
    pixels = decode(contents, channels)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert difference(pixels, by_pillow(contents, channels)) <= (kind == "JPEG")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_the_wanted_size_is_its_own_centre(kind, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    contents = encoded(pixels, kind)
    centre = resized_centre(contents, channels, 32)
    np.testing.assert_array_equal(centre, decode(contents, channels))
    assert (
        difference(
            centre, resized_centre(encoded(pixels[:, :31], kind), 3, 32)[..., :channels]
        )
        > 1
    )


@given(st.integers(30, 200), st.integers(30, 200), CHANNELS, st.integers(8, 64))
@settings(deadline=None, max_examples=50)
def test_the_centre_is_that_of_pillow(height, width, channels, size):
    contents = encoded(smooth(height, width, seed=width))
    side = min(height, width) * 224 / 256
    x, y = (width - side) / 2, (height - side) / 2
    box = (x, y, x + side, y + side)
    if (height, width) != (size, size):
        centre = resized_centre(contents, channels, size)
        assert difference(centre, by_pillow(contents, channels, box, size)) < 1.5


# Odd files.


def rgba(height: int, width: int) -> np.ndarray:
    alpha = np.arange(height * width).reshape(height, width, 1) % 256
    return np.concatenate([smooth(height, width), alpha], -1).astype(np.uint8)


def cmyk(height: int, width: int) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(smooth(height, width)).convert("CMYK")
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def palette(height: int, width: int, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(smooth(height, width)).quantize(200).save(file, "PNG", **options)
    return file.getvalue()


def with_exif(height: int, width: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(smooth(height, width), exif=exif)


def with_thumbnail(height: int, width: int) -> bytes:
    contents = encoded(smooth(height, width))
    thumbnail = b"Exif\0\0" + encoded(smooth(16, 20, seed=1))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    return contents[:2] + segment + contents[2:]


ODD = {
    "trailing bytes": encoded(smooth(60, 80)) + b"\0more\xff\xd8" * 9,
    "trailing image": encoded(smooth(60, 80)) + encoded(smooth(10, 10)),
    "thumbnail": with_thumbnail(60, 80),
    "bytes before a segment": (j := encoded(smooth(60, 80)))[:20] + b"abc" + j[20:],
    "progressive": encoded(smooth(60, 80), progressive=True),
    "optimised": encoded(smooth(60, 80), optimize=True),
    "grey": encoded(smooth(60, 80)[..., 0]),
    "grey, progressive": encoded(smooth(60, 80)[..., 0], progressive=True),
    "CMYK": cmyk(60, 80),
    "EXIF": with_exif(60, 80),
    "comment": encoded(smooth(60, 80), comment=b"\xff\xd9\xff\xda" * 100),
    "restart markers": encoded(smooth(60, 80), restart_marker_blocks=3),
    "colour kept whole": encoded(smooth(60, 80), subsampling=0),
    "RGB, not YCbCr": encoded(smooth(60, 80), keep_rgb=True),
    "one pixel": encoded(smooth(1, 1)),
    "wide": encoded(smooth(20, 3000)),
    "tall": encoded(smooth(3000, 20)),
    "tall and thin": encoded(smooth(3000, 1)),
    "PNG": encoded(smooth(60, 80), "PNG"),
    "PNG, RGBA": encoded(rgba(60, 80), "PNG"),
    "PNG, grey": encoded(smooth(60, 80)[..., 0], "PNG"),
    "PNG, two colours": encoded(smooth(60, 80)[..., 0] > 127, "PNG"),
    "PNG, palette": palette(60, 80),
    "PNG, palette, transparent": palette(60, 80, transparency=bytes(range(200))),
    "PNG, one pixel": encoded(smooth(1, 1), "PNG"),
    "GIF": encoded(smooth(60, 80)[..., 0], "GIF"),
    "WebP": encoded(smooth(60, 80), "WEBP"),
    "BMP": encoded(smooth(60, 80), "BMP"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's own
def test_odd_files_are_read_as_pillow_reads_them(name, channels):
    contents = ODD[name]
    reference = by_pillow(contents, channels)
    pixels = decode(contents, channels)
    assert pixels.dtype == np.uint8
    assert difference(pixels, reference) < 3
    for size in (8, 33):
        crop = random_resized_crop(contents, channels, size, np.random.default_rng(0))
        assert crop.shape == (size, size, channels)
        height, width = reference.shape[:2]
        box = decoding._centre_box(height, width)
        centre = resized_centre(contents, channels, size)
        if min(height, width) > 8:
            assert difference(centre, by_pillow(contents, channels, box, size)) < 4


def test_orientation_is_not_looked_at():
    pixels = smooth(60, 80)
    np.testing.assert_array_equal(
        decode(with_exif(60, 80), 3), decode(encoded(pixels), 3)
    )
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(file.getvalue(), 3), pixels)


def test_transparency_does_not_warn_and_does_not_change_colours():
    opaque, contents = palette(60, 80), ODD["PNG, palette, transparent"]
    np.testing.assert_array_equal(decode(contents, 3), decode(opaque, 3))
    np.testing.assert_array_equal(
        decode(encoded(rgba(60, 80), "PNG"), 3), smooth(60, 80)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_upper_eight(channels):
    deep = (np.arange(60 * 80).reshape(60, 80) * 13).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(deep, kind), channels)
        expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], channels, -1)
        np.testing.assert_array_equal(pixels, expected)


# Broken files.


def calls(contents: bytes) -> None:
    """All three functions refuse the bytes, with a reason in one line."""
    for call in (
        lambda: decode(contents, 3),
        lambda: decode(contents, 1),
        lambda: resized_centre(contents, 3, 16),
        lambda: random_resized_crop(contents, 3, 16, np.random.default_rng(0)),
    ):
        with pytest.raises(BrokenImage) as info:
            call()
        reason = str(info.value)
        assert 0 < len(reason) < 120
        assert "\n" not in reason
        assert " at 0x" not in reason


TRUNCATED = {
    "JPEG": encoded(smooth(60, 80)),
    "JPEG, progressive": encoded(smooth(60, 80), progressive=True),
    "JPEG, grey": encoded(smooth(60, 80)[..., 0]),
    "JPEG, restart markers": encoded(smooth(60, 80), restart_marker_blocks=3),
    "JPEG, thumbnail": with_thumbnail(60, 80),
    "JPEG, CMYK": cmyk(60, 80),
}


@pytest.mark.parametrize("name", TRUNCATED)
def test_a_jpeg_cut_anywhere_is_refused(name):
    contents = TRUNCATED[name]
    for length in {
        *range(0, len(contents), 61),
        *range(len(contents) - 20, len(contents)),
    }:
        calls(contents[:length])


@pytest.mark.parametrize("size", [224, 64, 16])
def test_a_large_jpeg_cut_below_the_crop_is_refused(size):
    noise = np.random.default_rng(0).integers(0, 256, (600, 500, 3), np.uint8)
    contents = encoded(noise, quality=80)
    for part in (0.3, 0.9, 0.99):
        for seed in range(4):
            with pytest.raises(BrokenImage, match="Premature end"):
                random_resized_crop(
                    contents[: int(part * len(contents))],
                    3,
                    size,
                    np.random.default_rng(seed),
                )


@pytest.mark.parametrize("part", [0.01, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's own
def test_other_formats_cut_in_the_middle_are_refused(kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    contents = encoded(noise, kind)
    calls(contents[: int(part * len(contents))])


@pytest.mark.parametrize(
    "contents", [b"", b"\0", b"a text\n" * 20, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused(contents):
    calls(contents)


@given(SEEDS, st.booleans())
@settings(deadline=None, max_examples=100)
def test_garbage_behind_a_good_header_is_refused(seed, progressive):
    contents = encoded(smooth(300, 400), progressive=progressive)
    header = contents[: contents.index(b"\xff\xda") + 14]
    garbage = np.random.default_rng(seed).bytes(20_000)
    for tail in (b"", b"\xff\xd9"):
        calls(header + garbage + tail)


def test_what_libjpeg_turbo_finds_corrupt_is_refused_at_once():
    contents = bytearray(encoded(smooth(300, 400)))
    middle = len(contents) // 2
    contents[middle : middle + 2] = b"\xff\xd9"  # ends too early, yet is not cut off
    for call in (decode, lambda *args: decoding.resized_centre(*args, 16)):
        with pytest.raises(BrokenImage, match="Corrupt JPEG data: premature end"):
            call(bytes(contents), 3)


@given(SEEDS)
@settings(deadline=None, max_examples=100)
def test_damaged_files_give_pixels_or_are_refused(seed):
    """No other exception, whatever byte is hit."""
    rng = np.random.default_rng(seed)
    for contents in (ODD["grey"], ODD["PNG, palette"], ODD["WebP"], ODD["GIF"]):
        damaged = bytearray(contents)
        for place in rng.integers(0, min(len(damaged), 600), 3):
            damaged[place] = rng.integers(256)
        try:
            size = headers.size_of(bytes(damaged))
        except BrokenImage:
            continue
        if math.prod(size) < 1e6:
            with contextlib.suppress(BrokenImage):
                resized_centre(bytes(damaged), 3, 16)
