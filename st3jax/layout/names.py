"""What Flax's own names say of a kernel's axes, and how far they say it.

A name, the shape and the bias beside a kernel leave one reading, or several: then
somebody has to say which, if the result depends on it.
"""

import re
from collections.abc import Callable, Mapping

from st3jax.layout.letters import stack_shape

__all__ = ["is_layer", "readings"]

Shape = tuple[int, ...]
STACKS = ("layer", "layers", "block", "blocks", "stage", "stages", "expert", "experts")
"""Logical names of axes that stack kernels."""
EMBED = ("embed", "embedding", "embed_dim", "model", "d_model", "hidden")
"""Logical names of the axis that a query sums over."""
HEADS = ("heads", "head", "num_heads", "q_heads", "kv_heads")
"""Logical names of the axis that attention heads lie on."""


def readings(
    path: str, shapes: Mapping[str, Shape], axis_names: tuple[str | None, ...] = ()
) -> tuple[str, ...]:
    """The layouts that a leaf may have, the likeliest first.

    Args:
        path: Names on the way to the leaf, joined by ``/``.
        shapes: Shape of every parameter by path: a kernel's bias tells its outputs.
        axis_names: Logical names of the leaf's axes, if it has any.

    Returns:
        One layout if the name settles it, otherwise all that are possible.

    Example:
        >>> readings("Dense_0/kernel", {"Dense_0/kernel": (6, 64, 256)})
        ('sio',)
        >>> readings("mlp/kernel", {"mlp/kernel": (6, 64, 256)})
        ('wio', 'sio', 'ioo', 'iio')
        >>> shapes = {"mlp/kernel": (6, 64, 256), "mlp/bias": (6, 256)}
        >>> readings("mlp/kernel", shapes)
        ('sio',)
    """
    shape, parent = shapes[path], path.rpartition("/")[0]
    named = [axis for axis, name in enumerate(axis_names) if name in STACKS]
    if len(shape) - len(named) < 2:  # the name is that of a mesh's axis, say
        named = []
    left = [axis for axis in range(len(shape)) if axis not in named]
    bias = shapes.get(f"{parent}/bias" if parent else "bias")

    def whole(letters: str) -> str:
        return _with_stacks(letters, named, len(shape))

    def fits(letters: str) -> bool:
        return bias is None or _outputs(whole(letters), shape) == bias

    inner = _of_kernel(
        path,
        {**shapes, path: tuple(shape[axis] for axis in left)},
        tuple(axis_names[axis] for axis in left) if axis_names else (),
        fits,
    )
    return tuple(map(whole, inner))


def is_layer(path: str) -> bool:
    """Whether a leaf lies in a layer by one of Flax's own names.

    Example:
        >>> is_layer("block/Dense_0/kernel"), is_layer("block/mlp/kernel")
        (True, False)
    """
    layer = path.split("/")[-2:-1]
    own = r"(Dense|Conv|ConvTranspose)_\d+|query|key|value|out"
    return bool(layer and re.fullmatch(own, layer[0]))


def _with_stacks(letters: str, stacked: list[int], ndim: int) -> str:
    rest = iter(letters)
    return "".join("s" if axis in stacked else next(rest) for axis in range(ndim))


def _of_kernel(
    path: str,
    shapes: Mapping[str, Shape],
    axis_names: tuple[str | None, ...],
    fits: Callable[[str], bool],
) -> tuple[str, ...]:
    """The same, where no logical name says what is stacked; a bias fits, or not."""
    shape, (parent, name) = shapes[path], _parts(path)
    if len(shape) < 2:
        return ("o" * len(shape),)
    if name == "weight":
        return _of_weight(shape, fits)
    if len(shape) == 2:
        return ("oi",) if fits("oi") and not fits("io") else ("io",)
    heads = [axis for axis, own in enumerate(axis_names) if own in HEADS]
    if len(shape) == 3 and heads in ([0], [1]):
        split = "oio" if axis_names[1] in EMBED else "iio"
        return (split,) if heads == [0] else ("ioo",)
    named, possible = _by_name(parent, shapes, shape), _possible(len(shape))
    for likely in named:
        fitting = tuple(filter(fits, likely))
        if fitting:
            return fitting
    every = (*sum(named, ()), *possible)
    fitting = tuple(filter(fits, possible))
    if not fitting:  # the bias says that the name is not what it seems
        return tuple(dict.fromkeys(every))
    if fitting[0] == possible[0] and _is_window(shape[:-2]):
        return fitting[:1]
    return fitting


def _of_weight(shape: Shape, fits: Callable[[str], bool]) -> tuple[str, ...]:
    """Equinox's and PyTorch's are (out, in, window), others' (window, in, out)."""
    every = [
        "s" * stacks + letters
        for stacks in range(len(shape) - 1)
        for window in ["w" * (len(shape) - 2 - stacks)]
        for letters in (f"oi{window}", f"{window}io")
    ]
    fitting = tuple(filter(fits, every)) or tuple(every)
    last, first = _is_window(shape[2:]), _is_window(shape[:-2])
    if last != first and every[first] in fitting:
        return (every[first],)
    return fitting


def _parts(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent, name


def _by_name(
    parent: str, shapes: Mapping[str, Shape], shape: Shape
) -> tuple[tuple[str, ...], ...]:
    """What the name of a layer says, and what it may say if the bias denies that."""
    layer, ndim = re.sub(r"_\d+$", "", parent.rpartition("/")[2]), len(shape)
    if layer == "Dense":
        return (("s" * (ndim - 2) + "io",),)
    if layer in ("query", "key", "value", "out") and _is_attention(parent, shapes):
        return (("s" * (ndim - 3) + ("iio" if layer == "out" else "ioo"),),)
    if "conv" in layer.lower() and layer != "ConvLocal":
        window = "w" * (ndim - 2)
        plain, stacked = window + "io", "s" + window[1:] + "io"
        swapped = (window + "oi",) * (layer == "ConvTranspose")
        likely = (plain,) if ndim < 5 else (plain, stacked)
        if ndim == 4 and shape[0] not in (1, shape[1]):  # may be a stack as well
            likely = (plain, stacked)
        return likely, (stacked, *swapped)
    return ()


def _is_attention(parent: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether the heads that a query splits into are those that an output joins."""
    above = parent.rpartition("/")[0]
    query, out = (
        shapes.get(f"{above}/{name}/kernel" if above else f"{name}/kernel")
        for name in ("query", "out")
    )
    return query is None or out is None or query[-2:] == out[-3:-1]


def _possible(ndim: int) -> tuple[str, ...]:
    """All readings of a kernel whose name says nothing."""
    more = "s" * (ndim - 3)
    plain = (
        "w" * (ndim - 2) + "io",
        "s" * (ndim - 2) + "io",
        more + "ioo",
        more + "iio",
    )
    return plain if ndim < 4 else (*plain, "s" + "w" * (ndim - 3) + "io")


def _is_window(sides: Shape) -> bool:
    """Whether these are the sides of a window, as (3, 3): equal, odd, two or more."""
    return len(sides) > 1 and len({*sides}) == 1 and sides[0] % 2 == 1


def _outputs(layout: str, shape: Shape) -> Shape:
    """The shape that a bias has beside a kernel of this layout."""
    outputs = tuple(s for s, own in zip(shape, layout, strict=True) if own == "o")
    return stack_shape(layout, shape) + outputs
