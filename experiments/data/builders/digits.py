"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, no download."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["Digits"]


class Digits(tfds.core.GeneratorBasedBuilder):
    """Every fifth image is held out for testing: 1,438 for training, 359 for test.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998, as packaged by scikit-learn.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {
            "train": self._generate_examples(test=False),
            "test": self._generate_examples(test=True),
        }

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load_digits()
        for i, (pixels, label) in enumerate(
            zip(digits.images, digits.target, strict=True)
        ):
            if (i % 5 == 4) != test:
                continue
            png = io.BytesIO()  # encoded here, so that TFDS needs no TensorFlow
            Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(
                png, "PNG"
            )
            png.seek(0)
            yield i, {"image": png, "label": int(label)}
