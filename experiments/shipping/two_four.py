"""Which kernels PyTorch's semi-structured tensors take, and of the others why not.

``torch.sparse.to_sparse_semi_structured`` wants a matrix (outputs, inputs) on an NVIDIA
GPU with at most two non-zeros in every four inputs, in half precision or int8 (float32
would be 1:2), and with sides that its libraries can do. The sides are those that the
installed PyTorch names.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from shipping.network import Network
from shipping.torch_names import Tensor, named_tensors

__all__ = ["DTYPES", "Kernel", "kernels", "print_table"]

LIBRARIES: dict[str, Any] = {
    "CUTLASS": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    "cuSPARSELt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
}
DTYPES = {"half": (torch.float16, torch.bfloat16), "int8": (torch.int8,)}
"""What a kernel may be converted to, by the words of the table."""


class Kernel(NamedTuple):
    """A kernel, as PyTorch has it.

    Attributes:
        name: Of its tensor.
        shape: Of its tensor.
        taken: From library to the dtypes in which it takes the kernel, by the names in
            ``DTYPES``.
        problem: Why none takes it, if none does.
    """

    name: str
    shape: tuple[int, ...]
    taken: dict[str, list[str]]
    problem: str


def kernels(tensors: dict[str, Tensor]) -> list[Kernel]:
    """All kernels among a network's tensors."""
    return [
        _kernel(name, tensor.values)
        for name, tensor in tensors.items()
        if {*"oi"} <= {*tensor.letters}
    ]


def print_table(console: Console, network: Network) -> None:
    """Prints a row for each kernel."""
    found = kernels(named_tensors(network))
    count = sum(not kernel.problem for kernel in found)
    title = f"2:4 in PyTorch: {count} of {len(found)} kernels"
    table = Table(
        title=title,
        caption="half: float16 or bfloat16; fours: with 3 or 4 non-zeros",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("kernel", overflow="fold")
    for heading in ("shape", *LIBRARIES, "why not"):
        table.add_column(heading)
    for name, shape, taken, problem in found:
        cells = (", ".join(dtypes) for dtypes in taken.values())
        sides = "x".join(map(str, shape))
        table.add_row(name.removesuffix(".weight"), sides, *cells, problem)
    console.print(table)


def _kernel(name: str, values: np.ndarray) -> Kernel:
    problem = _misfit(values)
    taken = {
        library: [x for x in DTYPES if not problem and _fits(values, library, x)]
        for library in LIBRARIES
    }
    if not problem and not any(taken.values()):
        problem = "its sides"
    return Kernel(name, values.shape, taken, problem)


def _misfit(values: np.ndarray) -> str:
    """Why a kernel is no 2:4 matrix, if it is none."""
    if values.ndim != 2:
        return "convolution"
    if values.shape[1] % 4:
        return "its inputs"
    counts = np.count_nonzero(values.reshape(-1, 4), axis=1)
    denser = int(np.sum(counts > 2))
    return f"{denser:,} of {counts.size:,} fours" if denser else ""


def _fits(values: np.ndarray, library: str, dtypes: str) -> bool:
    """Whether the sides of a kernel are multiples of what a library can do."""
    least = [LIBRARIES[library]._DTYPE_SHAPE_CONSTRAINTS[x] for x in DTYPES[dtypes]]
    rows, columns = values.shape
    return not any(
        rows % own.sparse_min_rows or columns % own.sparse_min_cols for own in least
    )
