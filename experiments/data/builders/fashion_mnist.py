"""Fashion-MNIST from the files of a Debian package, as TFDS itself would prepare it."""

import gzip
import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from errors import UserError

__all__ = ["SOURCE", "FashionMnist"]

SOURCE = "/usr/share/datasets/fashion-mnist"  # where the package puts its files
PREFIXES = {"train": "train", "test": "t10k"}  # split, how its files' names begin
UNSIGNED_BYTES = 8  # idx's code for the only type of number that these files hold

_TfdsBuilder: Any = tfds.builder_cls("fashion_mnist")


class FashionMnist(
    _TfdsBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """TFDS's ``fashion_mnist``, read from local files and without TensorFlow.

    Name, version, features and keys are those of TFDS's class, which opens the result.

    Source: H. Xiao, K. Rasul and R. Vollgraf, arXiv:1708.07747.

    Args:
        source: Folder of the four files.
        **options: Those of any builder of TFDS.

    Raises:
        UserError: If a file is missing or damaged.
    """

    name = "fashion_mnist"

    def __init__(self, *, source: str = SOURCE, **options: Any):
        super().__init__(**options)
        folder = pathlib.Path(source)
        self._splits = {
            split: self._read(folder, prefix) for split, prefix in PREFIXES.items()
        }

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {
            split: self._generate_examples(*arrays)
            for split, arrays in self._splits.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            # TFDS encodes an array with TensorFlow, but a PIL image without it.
            yield i, {"image": Image.fromarray(image), "label": int(label)}

    def _read(self, folder: pathlib.Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of one split, of which every byte was checked."""
        features = self.info.features
        image_file = folder / f"{prefix}-images-idx3-ubyte.gz"
        label_file = folder / f"{prefix}-labels-idx1-ubyte.gz"
        images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if images.shape[1:] != features["image"].shape[:2]:
            height, width = images.shape[1:]
            raise _unusable(image_file, f"has images of {height}x{width} pixels")
        if labels.size and labels.max() >= features["label"].num_classes:
            raise _unusable(label_file, f"has the label {labels.max()}")
        if len(labels) != len(images):
            raise _unusable(
                label_file, f"has {len(labels):,} labels for {len(images):,} images"
            )
        return images, labels


def read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
    """Reads a gzipped idx file: magic number, sizes of the axes, unsigned bytes.

    Args:
        path: The file.
        ndim: Number of axes that it has to have.

    Returns:
        uint8 array with ``ndim`` axes.

    Raises:
        UserError: If the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise _unusable(path, "is missing")
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise _unusable(path, f"cannot be read ({error})") from None
    header = 4 * (1 + ndim)
    if data[:4] != bytes([0, 0, UNSIGNED_BYTES, ndim]) or len(data) < header:
        raise _unusable(path, f"is not an idx file of bytes with {ndim} axes")
    shape = np.frombuffer(data[4:header], ">u4").tolist()
    if len(data) - header != math.prod(shape):
        raise _unusable(
            path, f"has {len(data) - header:,} bytes, not {math.prod(shape):,}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _unusable(path: pathlib.Path, problem: str) -> UserError:
    return UserError(
        f"{path} {problem}: Debian's package has a good one, apt-get install "
        "--reinstall dataset-fashion-mnist; name its folder with --source=..."
    )
