"""Which layout each prunable leaf has: as somebody said, else as Flax's names say."""

import fnmatch
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta

from st3jax.checks import as_mapping
from st3jax.layout.letters import Layouts, broadcast
from st3jax.layout.names import readings
from st3jax.trees import (
    Static,
    all_paths,
    is_boxed,
    is_placeholder,
    map_named,
    named_leaves,
    path_name,
)

__all__ = [
    "as_structure",
    "check_layout",
    "named_readings",
    "on_weights",
    "said_of",
    "settle",
]

CLOSE = 0.8
"""From how alike two paths are on, in [0, 1], one is the other misspelt."""
HINT = ": trace lambda params, x: model.apply({'params': params}, x)"
MEANING = {
    "s": "stacked kernels",
    "w": "the window of a convolution",
    "i": "inputs",
    "o": "outputs",
}
ENOUGH = {
    "kernels": str.maketrans("wio", "ooo"),
    "channels": str.maketrans("w", "i"),
    "groups": str.maketrans("wo", "ss"),
    "matrix": str.maketrans("w", "s"),
    "axes": {},
}
"""What has to be told apart: what is stacked, what is averaged, inputs, inputs and
outputs, or all axes."""


def settle(
    leaves: Mapping[str, Any],
    params: Any,
    layout: Layouts | None,
    needs: Mapping[str, str],
) -> dict[str, str]:
    """The layout of each prunable leaf.

    Args:
        leaves: The prunable leaves by path.
        params: Pytree of all parameters.
        layout: What somebody said: from path, where ``*`` stands for any text, to
            letters; the first that matches counts.
        needs: What depends on layouts, in words, and how far: ``"kernels"``,
            ``"channels"``, ``"groups"``, ``"matrix"`` or ``"axes"``.

    Returns:
        From path to letters. A leaf that nothing settles has its likeliest reading if
        nothing depends on which.

    Raises:
        ValueError: If letters do not fit a leaf, if a path matches no parameter (of
            several full paths, as a whole model's layouts have, some may be missing,
            but for one that is almost that of a leaf of which nothing is said), or if
            nothing settles what a result depends on.
        TypeError: If ``layout`` is not a mapping to texts.

    Example:
        >>> params = {"mlp": {"kernel": jnp.ones((6, 64, 256))}}
        >>> settle(named_leaves(params), params, {"mlp/*": "sio"}, {})
        {'mlp/kernel': 'sio'}
    """
    if is_placeholder(params):
        return dict.fromkeys(leaves, "")
    check_layout(layout)
    _check_paths(as_mapping(layout) or {}, all_paths(params), leaves)
    found, named = {}, named_readings(leaves, params)
    for path, leaf in leaves.items():
        letters = said_of(path, layout)
        if letters is None:
            _check_settled(path, jnp.shape(leaf), named[path], needs)
            letters = named[path][0]
        _check_letters(path, jnp.shape(leaf), letters)
        found[path] = letters
    return found


def said_of(path: str, layout: Layouts | None) -> str | None:
    """What somebody said of a leaf: the first path that matches counts.

    Example:
        >>> said_of("head/kernel", {"*": "oi"}), said_of("head/kernel", None)
        ('oi', None)
    """
    said = as_mapping(layout) or {}
    return next((said[pattern] for pattern in said if _matches(path, pattern)), None)


def named_readings(paths: Iterable[str], params: Any) -> dict[str, tuple[str, ...]]:
    """The layouts that leaves may have by the names of their tree and of their axes.

    Example:
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3))}}
        >>> named_readings(["Dense_0/kernel"], params)
        {'Dense_0/kernel': ('io',)}
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in named_leaves(params).items()}
    logical = _logical_names(params)
    return {path: readings(path, shapes, logical.get(path, ())) for path in paths}


def as_structure(layouts: Layouts, params: Any) -> Any:
    """Layouts as a state carries them: as part of its structure.

    The place holder of ``optax.tree.map_params`` knows none, so a scalar stands there
    for whatever there is.

    Example:
        >>> as_structure({"kernel": "io"}, {"kernel": jnp.ones((2, 3))}).value
        (('kernel', 'io'),)
    """
    if is_placeholder(params):
        return jnp.zeros([])
    return Static(tuple(layouts.items()))


def on_weights(values: Any, layouts: Static) -> Any:
    """A tree of values of kernels, in shapes that broadcast to the weights.

    Example:
        >>> on_weights({"kernel": jnp.ones(6)}, Static((("kernel", "sio"),)))[
        ...     "kernel"].shape
        (6, 1, 1)
    """
    letters = dict(layouts.value)
    return map_named(lambda path, x, _: broadcast(x, letters[path]), values, values)


def check_layout(layout: Any) -> None:
    """Raises unless ``layout`` is a mapping from paths to letters, or ``None``.

    Raises:
        TypeError: With what was passed instead.
        ValueError: With a letter that is none.

    Example:
        >>> check_layout({"mlp/kernel": "in,out"})
        Traceback (most recent call last):
        ValueError: the layout of 'mlp/kernel' has a letter for each axis (s: stacked \
kernels, w: the window of a convolution, i: inputs, o: outputs), got 'in,out'
    """
    said = None if layout is None else as_mapping(layout)
    if layout is not None and said is None:
        raise TypeError(
            "layout is a mapping from the path of a leaf to a letter for each of its "
            f"axes, such as {{'blocks/*': 'sio'}}, got {layout!r}"
        )
    for path, letters in (said or {}).items():
        if not isinstance(letters, str) or not set(letters) <= set(MEANING):
            listed = ", ".join(f"{letter}: {what}" for letter, what in MEANING.items())
            raise ValueError(
                f"the layout of {path!r} has a letter for each axis ({listed}), got "
                f"{letters!r}"
            )


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


def _check_paths(
    said: Mapping[str, str], paths: list[str], leaves: Iterable[str]
) -> None:
    """Raises at a path that matches nothing, as one that is misspelt."""

    def is_there(path: str, pattern: str) -> bool:
        within = pattern.startswith(f"{path}/")  # of a part that a wrapper has masked
        return within or _matches(path, pattern)

    def is_misspelt(pattern: str) -> bool:
        inner = pattern.removeprefix("params/")
        return inner in unsaid or bool(get_close_matches(pattern, unsaid, 1, CLOSE))

    unsaid = [path for path in leaves if said_of(path, said) is None]
    for pattern in said:
        if any(is_there(path, pattern) for path in paths):
            continue
        # Layouts of a whole model may be given for a part of it, or for another one.
        if "*" in pattern or len(said) == 1 or is_misspelt(pattern):
            listed = ", ".join(repr(path) for path in paths[:3])
            of_variables = pattern.removeprefix("params/") in paths
            raise ValueError(
                f"the path {pattern!r} of layout matches no parameter: there are "
                f"{listed} and others{HINT * of_variables}"
            )


def _check_letters(path: str, shape: tuple[int, ...], letters: str) -> None:
    if len(letters) != len(shape):
        raise ValueError(
            f"the layout {letters!r} of '{path}' has {len(letters)} letters, but the "
            f"leaf has {len(shape)} axes, of the sizes {shape}"
        )
    if len(shape) and not set(letters) & {"i", "o"}:
        raise ValueError(
            f"the layout {letters!r} of '{path}' has neither inputs (i) nor outputs "
            "(o), so there is no kernel"
        )


def _check_settled(
    path: str, shape: tuple[int, ...], possible: tuple[str, ...], needs: Any
) -> None:
    """Raises if a result depends on which of the possible layouts a leaf has."""
    for what, how_far in needs.items():
        if len({letters.translate(ENOUGH[how_far]) for letters in possible}) > 1:
            listed = " or ".join(repr(letters) for letters in possible)
            raise ValueError(
                f"what the axes of '{path}' of shape {shape} are is not clear from its "
                f"name (they may be {listed}; s: stacked kernels, w: window, i: "
                f"inputs, o: outputs), and {what} depends on it: pass layout={{"
                f"'{path}': '{possible[0]}'}}, or let the model say with "
                "layout=st3jax.layouts(apply_fn, params, inputs); for NNX, "
                "layout=st3jax.nnx.layouts(model)"
            )


def _logical_names(params: Any) -> dict[str, tuple[str | None, ...]]:
    """The names that boxes give to the axes of what they hold, by path."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_boxed)
    return {path_name(path): _names_of(node) for path, node in nodes if is_boxed(node)}


def _names_of(box: Any) -> tuple[str | None, ...]:
    if isinstance(box, nnx.Variable):
        known = box.get_metadata()
        keys = ("sharding_names", "out_sharding", "sharding")
        names = next((known[key] for key in keys if known.get(key)), ())
    else:
        names = getattr(box, "names", ()) if isinstance(box, meta.AxisMetadata) else ()
    return tuple(names) if isinstance(names, tuple | list) else ()
