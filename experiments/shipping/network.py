"""A trained network, as every export takes it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Network"]


class Network(NamedTuple):
    """What there is to ship, with what its exports are checked on.

    Attributes:
        name: Of the architecture, such as ``"imagenet_resnet"`` or ``"transformer"``.
        apply: ``(variables, images) -> logits``, in inference, for any batch size.
        variables: Nested dicts of arrays on the host, zeros in place, as ``apply``
            takes them.
        images: Real images as ``apply`` takes them, normalised, float32 [N, ...].
        metadata: What a file says about itself: settings, sparsity, mean and standard
            deviation of pixels; JSON can hold it.
    """

    name: str
    apply: Callable[[Any, Any], Any]
    variables: Any
    images: np.ndarray
    metadata: dict[str, Any]
