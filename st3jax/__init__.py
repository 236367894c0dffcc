"""Sparse training in JAX: ST-3 as a function of parameters and an Optax transform.

    tx = st3jax.st3(optax.sgd(0.1, momentum=0.9), sparsity=0.9)   # wraps your optimizer
    w = st3jax.sparsify(params, opt_state)                        # in your loss
    weights = st3jax.finalize(params, opt_state)                  # exact zeros, to ship

Another method is another name in the first line: ``ste``, ``gmp``, ``lrr``,
``probmask``, ``granet``, ``rigl``, ``set_`` or ``str_``; or ``hold_zeros``, for a
network that is sparse already. NNX models have the same two functions in
:mod:`st3jax.nnx`; new methods are built from :mod:`st3jax.ops` and
:mod:`st3jax.selection`.
"""

from st3jax import nnx, ops, selection
from st3jax.base import SparseState, finalize, find_state, sparsify
from st3jax.engine.gradual import ThresholdState
from st3jax.engine.regrowth import RegrowthState
from st3jax.layouts import layouts
from st3jax.methods.gmp import gmp
from st3jax.methods.granet import granet
from st3jax.methods.hold_zeros import HoldState, hold_zeros
from st3jax.methods.lrr import lrr, lrr_cycles
from st3jax.methods.probmask.probmask import ProbMaskState, probmask
from st3jax.methods.rigl import rigl
from st3jax.methods.set_ import set_
from st3jax.methods.st3 import st3
from st3jax.methods.ste import ste
from st3jax.methods.str_ import STRState, str_
from st3jax.metrics import Layer, Summary, summary
from st3jax.multiply_adds import multiply_adds
from st3jax.one_shot import prune
from st3jax.rule import scores
from st3jax.schedules import polynomial_ramp
from st3jax.sparse_files import load_sparse, read_header, save_sparse
from st3jax.trees import is_kernel, kernel_mask
from st3jax.version import __version__

__all__ = [
    "HoldState",
    "Layer",
    "ProbMaskState",
    "RegrowthState",
    "STRState",
    "SparseState",
    "Summary",
    "ThresholdState",
    "__version__",
    "finalize",
    "find_state",
    "gmp",
    "granet",
    "hold_zeros",
    "is_kernel",
    "kernel_mask",
    "layouts",
    "load_sparse",
    "lrr",
    "lrr_cycles",
    "multiply_adds",
    "nnx",
    "ops",
    "polynomial_ramp",
    "probmask",
    "prune",
    "read_header",
    "rigl",
    "save_sparse",
    "scores",
    "selection",
    "set_",
    "sparsify",
    "st3",
    "ste",
    "str_",
    "summary",
]
