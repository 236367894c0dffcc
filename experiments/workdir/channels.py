"""Channels that are of no use any more, as the zeros of a kernel say."""

import math

import numpy as np

__all__ = ["dead_channels"]


def dead_channels(kernel: np.ndarray, layout: str) -> dict[str, int]:
    """How many channels a kernel has, and how many of them are dead.

    Args:
        kernel: The effective weights.
        layout: A letter for each axis: stacked, window, input or output. The channels
            of stacked kernels are counted together.

    Returns:
        ``outputs`` and ``inputs``; ``dead_outputs``, of which every weight is zero, and
        ``unread_inputs``, which no weight other than zero reads.

    Example:
        >>> dead_channels(np.array([[1.0, 0, 0], [0, 0, 0]]), "io")
        {'outputs': 3, 'dead_outputs': 2, 'inputs': 2, 'unread_inputs': 1}
    """
    (outputs, dead), (inputs, unread) = (
        _channels(kernel, layout, letter) for letter in "oi"
    )
    return {
        "outputs": outputs,
        "dead_outputs": dead,
        "inputs": inputs,
        "unread_inputs": unread,
    }


def _channels(kernel: np.ndarray, layout: str, letter: str) -> tuple[int, int]:
    """The channels of one kind, and those whose weights are all zero."""
    own = [axis for axis, x in enumerate(layout) if x in ("s", letter)]
    others = tuple(axis for axis in range(kernel.ndim) if axis not in own)
    used = np.any(kernel != 0, axis=others)
    return math.prod(kernel.shape[axis] for axis in own), int(np.sum(~used))
