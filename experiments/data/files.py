"""The contents of a file that is one, and is not too large to be an image."""

import os
import stat

from data.headers import BrokenImage

__all__ = ["read_file"]

BYTES_PER_PIXEL = 8  # four channels of 16 bits, not compressed
BYTES_BESIDES = 2**20


def read_file(path: str, max_pixels: int) -> bytes:
    """Reads a regular file, and waits for nothing else: a FIFO has no end.

    Args:
        path: Of the file, or of a link to it.
        max_pixels: The most that an image may have.

    Raises:
        BrokenImage: If it cannot be read, or is so large that it cannot be an image.
    """
    most = BYTES_PER_PIXEL * max_pixels + BYTES_BESIDES
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BrokenImage("it is no ordinary file")
            if status.st_size > most:
                raise BrokenImage(
                    f"it has {status.st_size:,} bytes, too many for "
                    f"config.data.max_pixels {max_pixels:,}"
                )
            return file.read(status.st_size)
    except OSError as error:
        raise BrokenImage(error.strerror or str(error)) from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
