"""Every field that a configuration has, with its unit; experiments override some.

Each is declared with its value and what it may be; a whole number does not fit a field
that is a text. Durations carry their unit in their name. Fractions are in [0, 1].

A field without a value, as ``whole(at_least=1)``, is of use to some methods or settings
only, and ``None`` here. Whoever sets it, in a file, on the command line or from Python,
has it so, and is told if it does nothing. While it is ``None`` it has the value of
``config.defaults``: what the method's publication says, else what all methods share.
"""

from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from fields import (
    choice,
    flag,
    number,
    numbers_of,
    pairs,
    text,
    texts,
    whole,
    wholes,
)

__all__ = ["DEFAULTS", "EPOCHS", "FIELDS", "get_config"]

EPOCHS = 10**6
"""As many as a run may have, and more than any has."""

MANY = 2**31
"""More than devices count to."""

FIELDS: dict[str, Any] = {
    # initialisation, order of the images, augmentation
    "seed": whole(0, at_least=0, below=2**32),
    "data": {
        "name": text("", "'digits', 'folder' or a data set of TFDS"),
        # Where TFDS keeps its data sets, "" for its own default; for "folder" what
        # holds <split>/<class>/<image>.
        "dir": text("", "a folder"),
        "train_split": text("train", "the name of a split"),
        "test_split": text("test", "the name of a split"),  # of other images
        # height and width after cropping, pixels
        "image_size": whole(32, at_least=1, at_most=2048),
        "in_memory": flag(False),  # decode every image once and keep it
        # processes that decode, else, on each host
        "workers": whole(at_least=0, at_most=1024),
        "broken_images": choice("stop", "stop", "skip"),  # or leave them out, counted
        # most pixels of an image, by its header, before anything is decoded
        "max_pixels": whole(64_000_000, at_least=1, below=MANY),
        # of the pixels in [0, 1], one number per channel
        "mean": numbers_of((0.0,), at_least=0, at_most=1),
        "std": numbers_of((1.0,), above=0),
        "augmentation": choice("none", "none", "shift", "resized_crop"),
        # "shift": edge padding before the crop
        "shift_pixels": whole(at_least=0, at_most=2048),
        "flip": flag(False),  # mirror half of the images
    },
    "model": {
        # see models/; it has some of these, and its own defaults
        "name": text("", "the name of a network"),
        # layers, as the network is named
        "depth": whole(at_least=1, at_most=1500),
        "width": whole(at_least=1, at_most=1024),  # channels of the first stage
        "multiplier": number(above=0, at_most=32),  # of the published channels
        "widen": whole(at_least=1, at_most=64),  # k of WideResNet-n-k
        "stem_stride": whole(at_least=1, at_most=64),
        "dropout": number(at_least=0, below=1),  # rate
        "norm_momentum": number(at_least=0, below=1),  # of BatchNorm, a step
        "dtype": choice(None, "float32", "bfloat16", "float16"),  # of the computation
    },
    "batch_size": whole(128, at_least=1, below=MANY),  # over all devices together
    "num_epochs": whole(160, at_least=1, below=EPOCHS),
    # more epochs, with the mask fixed
    "fine_tune_epochs": whole(at_least=0, below=EPOCHS),
    # then num_epochs again, mask fixed, rates rewound; with "gmp", the LRR of ST-3's
    # authors
    "second_cycle": flag(False),
    "label_smoothing": number(0.0, at_least=0, below=1),
    # parts that a batch is worked through in
    "accumulate_steps": whole(1, at_least=1, below=MANY),
    # of a moving average of the weights, a step; 0: none
    "ema_decay": number(0.0, at_least=0, below=1),
    # or "skip": such a gradient counts as zero
    "not_finite": choice("stop", "stop", "skip"),
    "optimizer": {
        "momentum": number(0.9, at_least=0, below=1),
        "weight_decay": number(1e-4, at_least=0),  # on kernels only
        "clip_norm": number(3.0, above=0),  # global norm of the gradient
    },
    "learning_rate": {
        "peak": number(0.1, at_least=0),
        "schedule": choice("step", "step", "cosine"),
        "per_epoch": flag(True),  # changes once an epoch, else every step
        "warmup_epochs": whole(at_least=0, below=EPOCHS),  # for "cosine"
        "drop_epochs": wholes("above 0, each after the one before"),  # for "step"
        "drop_factor": number(at_least=0),  # for "step"
        "fine_tune": number(at_least=0),  # constant while fine-tuning
    },
    "sparsity": {
        # "none" is the dense network; job/methods.py says which has which of these.
        "method": choice(
            "st3",
            *("none", "st3", "ste", "gmp", "lrr", "probmask", "granet"),
            *("rigl", "set_", "str_"),
        ),
        # share of zeros at the end; of this, power and update_every_steps it is st3jax
        # that checks the range
        "final": number(says="a fraction in [0, 1]"),
        "begin_epoch": number(at_least=0),  # the ramp
        "end_epoch": number(at_least=0),
        "power": number(says="a number above 0"),
        "criterion": choice(None, "l1", "l1_sigma"),
        "distribution": choice(None, "global", "uniform", "erk"),
        # what final is a share of: those of all kernels, or the network's work
        "budget": choice(None, "weights", "multiply_adds"),
        # for each layer, in place of final; the first path that matches counts, and
        # "*" in it stands for anything
        "layers": pairs("a path and its final", at_least=0, at_most=1),
        "dense": texts(),  # paths of kernels that stay dense; "*" as above
        # "" for any weights; a block is one on a kernel's last axes
        "pattern": text(None, "'', N:M such as '2:4', or a block such as '4x8'"),
        "soft": flag(),  # these three are ST-3's
        "rescale": flag(),
        "straight_through": flag(),
        "update_every_steps": whole(says="a number of steps, 1 or more", below=MANY),
    },
    "gmp": {"sticky": choice(None, "no", "strict", "published")},
    # share of what is left that a pruning keeps
    "lrr": {"keep": number(above=0, below=1)},
    "probmask": {
        "learning_rate": number(at_least=0),  # of the probabilities, by Adam
        "draw": choice(None, "largest", "bernoulli"),  # final mask
    },
    "granet": {
        # share of a layer that an update replaces
        "drop": number(at_least=0, at_most=1),
        "initial": number(at_least=0, at_most=1),  # sparsity at the start
    },
    "rigl": {
        "drop": number(at_least=0, at_most=1),
        # share of training until the mask is fixed
        "end": number(above=0, at_most=1),
    },
    "set_": {"drop": number(at_least=0, at_most=1)},
    "str_": {
        # its sigmoid is the first threshold
        "initial": number(at_least=-(10**6), at_most=10**6),
        # raises it: decides the sparsity
        "weight_decay": number(at_least=0),
    },
    "log_every_steps": whole(100, at_least=1, below=MANY),
    "eval_every_epochs": whole(1, at_least=1, below=MANY),
    # test raw weights too, until they are fixed
    "eval_dense": flag(),
    "checkpoint_every_epochs": number(5.0, above=0, at_most=EPOCHS),
}
"""Every field, by section."""


def get_config() -> ml_collections.ConfigDict:
    """The fields, and the most common values of those that are of use to all."""
    config = _section(FIELDS)
    config.defaults = ml_collections.ConfigDict(DEFAULTS)
    return config


def _section(fields: dict[str, Any]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    for name, field in fields.items():
        if isinstance(field, dict):
            config[name] = _section(field)
        else:
            none = placeholder(field.type)
            config[name] = none if field.default is None else field.default
    return config


DEFAULTS: dict[str, Any] = {
    "common": {
        "data": {"workers": 0, "shift_pixels": 4},
        "fine_tune_epochs": 10,
        "learning_rate": {
            "warmup_epochs": 0,
            "drop_epochs": (80, 120),
            "drop_factor": 0.1,
            "fine_tune": 1e-3,
        },
        "sparsity": {
            "final": 0.9,
            "begin_epoch": 5.0,
            "end_epoch": 80.0,
            "power": 3.0,
            "criterion": "l1",
            "distribution": "global",
            "budget": "weights",
            "layers": (),
            "dense": (),
            "pattern": "",
            "soft": True,
            "rescale": True,
            "straight_through": True,
            "update_every_steps": 1,
        },
        "gmp": {"sticky": "no"},
        "lrr": {"keep": 0.8},
        "probmask": {"learning_rate": 6e-3, "draw": "largest"},
        "granet": {"drop": 0.5, "initial": 0.0},
        "rigl": {"drop": 0.3, "end": 0.75},
        "set_": {"drop": 0.3},
        "str_": {"initial": -3200.0, "weight_decay": 2.2518e-5},
        "eval_dense": True,
    },
    # What a method's publication sets otherwise than that of ST-3; "ramp" stands for
    # begin_epoch and end_epoch, as shares of num_epochs.
    "lrr": {"fine_tune_epochs": 0},  # num_epochs for each cycle
    "probmask": {"ramp": (0.16, 0.6)},
    "granet": {
        "ramp": (0.0, 0.5),
        "fine_tune_epochs": 0,
        "sparsity": {"update_every_steps": 1000},
    },
    "rigl": {
        "fine_tune_epochs": 0,
        "sparsity": {"update_every_steps": 100, "distribution": "erk"},
    },
    "set_": {
        "fine_tune_epochs": 0,
        "sparsity": {"update_every_steps": 100, "distribution": "erk"},
    },
}
"""``config.defaults``: the values of fields that are ``None``, by method."""
