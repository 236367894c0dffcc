"""The training program on its smallest network, here or in its own process."""

import sys
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from ml_collections import config_dict, config_flags

import digits_st3
import train
from data.sources import Data
from job.build import assemble
from job.settings import settle
from workdir import checkpoints

TINY = {  # two epochs and one of fine-tuning, in seconds
    "seed": 3,
    "model.width": 4,
    "num_epochs": 2,
    "defaults.common.fine_tune_epochs": 1,  # of methods without their own
    "defaults.common.sparsity.begin_epoch": 0.0,
    "defaults.common.sparsity.end_epoch": 1.0,
    "defaults.common.sparsity.final": 0.6,
    "eval_every_epochs": 1,
    "checkpoint_every_epochs": 1.0,
}


def tiny(**overrides) -> config_dict.ConfigDict:
    """A configuration that trains in seconds; dotted names reach inner fields."""
    config = digits_st3.get_config()
    config.update_from_flattened_dict(TINY | overrides)
    return config


def parsed(*arguments):
    """The configuration that these flags of ``train.py`` ask for."""
    values = flags.FlagValues()
    command = ["train.py", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    with warnings.catch_warnings():  # ml_collections loads files in an old way
        warnings.simplefilter("ignore", DeprecationWarning)
        rest = values(command)
    assert rest == ["train.py"]
    return values.config


def stand_in(config, classes=10, steps_per_epoch=22):
    """The job of a configuration, with nothing in the place of its images."""
    images = [None] * (steps_per_epoch * config.batch_size)
    return assemble(settle(config), Data(images, [], classes))


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
