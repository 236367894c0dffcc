"""A network's tensors as PyTorch names and lays them out, and the way back.

A kernel becomes (outputs, inputs, window), split heads are joined, and stacked layers
are numbered: ``blocks/attention/query/kernel`` of shape (layers, inputs, heads, width)
becomes ``blocks.0.attention.query.weight`` of shape (heads x width, inputs) and so on.
An ImageNet ResNet has the names of torchvision.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import st3jax
from errors import UserError
from models.resnet import IMAGENET_STAGES
from shipping.network import Network

__all__ = ["Tensor", "named_tensors", "torchvision_depth", "variables_of"]

COLLECTIONS = {"params", "batch_stats"}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
TORCHVISION = [
    (r"^stem\.", "conv1."),
    (r"^stem_norm\.", "bn1."),
    (r"^head\.", "fc."),
    (r"^stage(\d+)_block(\d+)_shortcut\.", r"layer\1.\2.downsample.0."),
    (r"^stage(\d+)_block(\d+)_shortcut_norm\.", r"layer\1.\2.downsample.1."),
    (r"^stage(\d+)_block(\d+)_conv(\d+)\.", r"layer\1.\2.conv\3."),
    (r"^stage(\d+)_block(\d+)_norm(\d+)\.", r"layer\1.\2.bn\3."),
]
TORCHVISION_WIDTH = 64  # of the first stage


class Tensor(NamedTuple):
    """A tensor of a file, and of which leaf it is a part.

    Attributes:
        values: The array as PyTorch has it.
        path: The leaf's path, ``None`` for what JAX's network does not have.
        place: Which of the kernels stacked in the leaf, none if it is the whole leaf.
        shape: Shape of that part in JAX.
        letters: What its axes are: ``o`` outputs, ``i`` inputs, ``w`` window, ``s``
            stacked; empty if it is left as it is.
    """

    values: np.ndarray
    path: tuple[Any, ...] | None
    place: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    letters: str = ""


class _Leaf(NamedTuple):
    path: tuple[Any, ...]
    values: np.ndarray
    letters: str


def named_tensors(network: Network) -> dict[str, Tensor]:
    """From PyTorch's name to tensor, each leaf of the network once or by layers.

    What the axes of kernels are is read off the traced computation.

    Raises:
        UserError: If an axis cannot be told, or two leaves would have one name.
    """
    try:
        letters = st3jax.layouts(network.apply, network.variables, network.images[:1])
    except ValueError as error:
        raise UserError(f"PyTorch's layout: {error}") from error
    found: dict[str, Tensor] = {}
    for names, tensor in _tensors(_modules(network.variables, letters), (), ()):
        name = ".".join([*names[:-1], LEAVES.get(names[-1], names[-1])])
        if name in found:
            paths = [found[name].path, tensor.path]
            which = " and ".join("/".join(map(str, path or ())) for path in paths)
            raise UserError(f"{which} would both be {name} in PyTorch: rename one")
        found[name] = tensor
    depth = torchvision_depth(network)
    return _as_torchvision(found, depth) if depth else found


def variables_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The network's variables again, of the values that tensors have.

    Raises:
        UserError: If a tensor has not the size of its leaf.
    """
    parts: dict[tuple[Any, ...], dict[tuple[int, ...], np.ndarray]] = {}
    for name, tensor in tensors.items():
        if tensor.path is None:
            continue
        if tensor.values.size != math.prod(tensor.shape):
            raise UserError(f"{name} has {tensor.values.size:,} weights, not as before")
        parts.setdefault(tensor.path, {})[tensor.place] = _from_torch(tensor)
    tree: dict[str, Any] = {}
    for path, layers in parts.items():
        *folders, last = path
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        sizes = tuple(np.max([*layers], 0) + 1) if () not in layers else ()
        shape = next(iter(layers.values())).shape
        stacked = [layers[place] for place in np.ndindex(sizes)]
        node[last] = np.stack(stacked).reshape(sizes + shape)
    return tree


def torchvision_depth(network: Network) -> int | None:
    """The depth of torchvision's ResNet that has the same tensors, if there is one."""
    if network.name != "imagenet_resnet":
        return None
    params = network.variables["params"]
    if params["stem"]["kernel"].shape[-1] != TORCHVISION_WIDTH:
        return None
    first = re.compile(r"stage(\d)_block\d+_conv1")
    stages = [found[1] for name in params if (found := first.fullmatch(name))]
    counts = tuple(stages.count(stage) for stage in sorted({*stages}))
    is_deep = "stage1_block1_conv3" in params
    for depth, blocks in IMAGENET_STAGES.items():
        if blocks == counts and is_deep == (depth >= 50):
            return depth
    return None


def _modules(variables: Any, letters: dict[str, str]) -> dict[str, Any]:
    """Variables without their collections, as a tree of modules with their leaves."""
    tree: dict[str, Any] = {}
    is_linen = "params" in variables and {*variables} <= COLLECTIONS

    def visit(node: Any, into: dict[str, Any], path: tuple[Any, ...]) -> None:
        for key, inner in node.items():
            place = (*path, key)
            if is_linen and not path:
                visit(inner, into, place)
            elif isinstance(inner, Mapping):
                visit(inner, into.setdefault(str(key), {}), place)
            else:
                into[str(key)] = _Leaf(place, np.asarray(inner), told(place, node))

    def told(path: tuple[Any, ...], module: Any) -> str:
        """Letters of a kernel's axes, and of those of the bias beside it."""
        if path[-1] == "bias" and "kernel" in module:
            beside = letters.get("/".join(map(str, (*path[:-1], "kernel"))), "")
            own = re.sub("[iw]", "", beside)
            return own if len(own) == np.ndim(module["bias"]) else ""
        if path[-1] in LEAVES and path[-1] != "kernel":
            return ""
        return letters.get("/".join(map(str, path)), "")

    visit(variables, tree, ())
    return tree


def _tensors(
    tree: Any, names: tuple[str, ...], place: tuple[int, ...]
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """All tensors of a module by their names, layer by layer where it is stacked."""
    if isinstance(tree, _Leaf):
        part, letters = tree.values[place], tree.letters[len(place) :]
        values = _to_torch(part, letters)
        yield names, Tensor(values, tree.path, place, part.shape, letters)
        return
    layers = _stacked(tree, len(place)) if names else 0
    for layer in range(layers):
        yield from _tensors(tree, (*names, str(layer)), (*place, layer))
    if not layers:
        for key, inner in tree.items():
            yield from _tensors(inner, (*names, key), place)


def _stacked(tree: Any, axis: int) -> int:
    """Of how many layers a module is the stack: all its leaves have so many."""
    leaves = [*_leaves(tree)]
    letters = [leaf.letters[axis:] for leaf in leaves if leaf.letters]
    sizes = {(*leaf.values.shape, 0, 0)[axis] for leaf in leaves}
    if letters and all(x.startswith("s") for x in letters) and len(sizes) == 1:
        return sizes.pop()
    return 0


def _leaves(tree: Any) -> Iterator[_Leaf]:
    if isinstance(tree, _Leaf):
        yield tree
        return
    for inner in tree.values():
        yield from _leaves(inner)


def _axes(letters: str) -> list[int]:
    """A kernel's axes in PyTorch's order."""
    return [axis for x in "soiw" for axis, own in enumerate(letters) if own == x]


def _to_torch(values: np.ndarray, letters: str) -> np.ndarray:
    if not letters:
        return np.ascontiguousarray(values).reshape(values.shape)
    moved = values.transpose(_axes(letters))
    sides = dict.fromkeys("oi", 1)
    for own, size in zip(letters, values.shape, strict=True):
        sides[own] = sides.get(own, 1) * size
    joined = [sides[own] for own in "oi" if own in letters]
    ahead, behind = letters.count("s"), letters.count("w")
    shape = (*moved.shape[:ahead], *joined, *moved.shape[moved.ndim - behind :])
    return np.ascontiguousarray(moved).reshape(shape)


def _from_torch(tensor: Tensor) -> np.ndarray:
    """The inverse of `_to_torch`."""
    if not tensor.letters:
        return tensor.values.reshape(tensor.shape)
    axes = _axes(tensor.letters)
    moved = tensor.values.reshape([tensor.shape[axis] for axis in axes])
    return moved.transpose(np.argsort(axes))


def _as_torchvision(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """With the names of torchvision, and what its networks have besides."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, to in TORCHVISION:
            name = re.sub(pattern, to, name)
        name = re.sub(r"^(layer\d+)\.(\d+)", _from_zero, name)
        found[name] = tensor
        if name.endswith(".running_mean"):  # torch.nn.BatchNorm2d counts steps
            count = name.replace("running_mean", "num_batches_tracked")
            found[count] = Tensor(np.zeros((), np.int64), None)
    head = found["fc.weight"].values
    found["fc.bias"] = Tensor(np.zeros(len(head), head.dtype), None)
    return found


def _from_zero(found: re.Match[str]) -> str:
    return f"{found[1]}.{int(found[2]) - 1}"
