"""The training program on its smallest network, here or in its own process."""

import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import config_dict

import digits_st3
import train
from workdir import checkpoints

TINY = {  # two epochs and one of fine-tuning, in seconds
    "seed": 3,
    "model.width": 4,
    "num_epochs": 2,
    "fine_tune_epochs": 1,
    "sparsity.begin_epoch": 0.0,
    "sparsity.end_epoch": 1.0,
    "sparsity.final": 0.6,
    "eval_every_epochs": 1,
    "checkpoint_every_epochs": 1.0,
}


def tiny(**overrides) -> config_dict.ConfigDict:
    """A configuration that trains in seconds; dotted names reach inner fields."""
    config = digits_st3.get_config()
    config.update_from_flattened_dict(TINY | overrides)
    return config


def command(workdir, **overrides):
    """What starts ``tiny(**overrides)`` in a process of its own."""
    fields = (TINY | overrides).items()
    return [
        sys.executable,
        train.__file__,
        f"--config={digits_st3.__file__}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields),
    ]


def last_state(workdir):
    """The newest checkpoint: its step, and its leaves by path."""
    with checkpoints.open_checkpoints(workdir) as manager:
        step = manager.latest_step()
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return step, leaves(manager.restore(step, args=args)["state"])


def leaves(tree):
    """From path to array."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def same_bits(a, b):
    """Whether two dictionaries of arrays hold the same bits."""
    return a.keys() == b.keys() and all(
        (a[k].dtype, a[k].shape, a[k].tobytes())
        == (b[k].dtype, b[k].shape, b[k].tobytes())
        for k in a
    )
