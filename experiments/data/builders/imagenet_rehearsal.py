"""A stand-in for ImageNet: few synthetic JPEGs, in the layout of TFDS's own set."""

import colorsys
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

__all__ = ["ImagenetRehearsal", "is_rehearsal"]

DESCRIPTION = "Synthetic images for a rehearsal: not ImageNet."
SIDES = (80, 201)  # smallest height and width in pixels, and one more than the largest
KINDS = 10  # of images that can be told apart; a label's kind is its last digit
NO_LABEL = -1  # what TFDS gives the images to test on: their labels are secret
GREY_EVERY = 10  # every tenth image is grey, as some of ImageNet are

_TfdsBuilder: Any = tfds.builder_cls("imagenet2012")


class ImagenetRehearsal(
    _TfdsBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Has TFDS's name, version, features and splits, so that TFDS's class opens it.

    Only its description differs, by which ``is_rehearsal`` knows it.

    Args:
        images: Number of images of each split, of train, validation and test.
        seed: The same seed gives the same images.
        **options: Those of any builder of TFDS.
    """

    name = "imagenet2012"
    pkg_dir_path = _TfdsBuilder.pkg_dir_path
    MANUAL_DOWNLOAD_INSTRUCTIONS = None

    def __init__(self, *, images: Mapping[str, int], seed: int = 0, **options: Any):
        self._images = images
        self._seed = seed
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        info = super()._info()
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=info.features,
            supervised_keys=info.supervised_keys,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._images}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        names = self.info.features["label"].names
        for i in range(self._images[split]):
            rng = np.random.default_rng([self._seed, *split.encode(), i])
            label = int(rng.integers(len(names)))
            image = draw(label % KINDS, grey=i % GREY_EVERY == 0, rng=rng)
            stem = names[label] if split == "train" else f"ILSVRC2012_{split}"
            file_name = f"{stem}_{i:08}.JPEG"
            example = {
                "image": image,  # TFDS needs no TensorFlow to encode a PIL image
                "label": NO_LABEL if split == "test" else label,
                "file_name": file_name,
            }
            yield file_name, example


def is_rehearsal(folder: pathlib.Path) -> bool:
    """Whether a folder holds a rehearsal, rather than ImageNet or something else."""
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
    except (OSError, ValueError):
        return False
    return info.get("description") == DESCRIPTION


def draw(kind: int, grey: bool, rng: np.random.Generator) -> Image.Image:
    """Stripes of a colour and a width that depend on the kind, with noise.

    Args:
        kind: Number from 0 to ``KINDS - 1``.
        grey: Whether to leave the colours out.
        rng: Source of the size, the stripes' position, the brightness and the noise.

    Returns:
        Image of mode "RGB", or "L" if grey.
    """
    height, width = rng.integers(*SIDES, size=2)
    period = 4 + 3 * kind  # pixels
    colour = np.array(colorsys.hsv_to_rgb(kind / KINDS, 0.7, rng.uniform(0.6, 1.0)))
    stripes = np.sin(2 * np.pi * (np.arange(width) / period + rng.uniform()))
    pixels = 255 * colour * (0.7 + 0.3 * stripes)[None, :, None]
    pixels = pixels + rng.normal(scale=12, size=(height, width, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("L") if grey else image
