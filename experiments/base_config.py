"""Every field that a configuration has, with its unit; experiments override some.

Durations carry their unit in their name. Fractions are in [0, 1].
"""

from collections.abc import Container
from typing import Any

import ml_collections

__all__ = ["get_config", "use_published"]


def get_config() -> ml_collections.ConfigDict:
    """The fields and their most common values."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # initialisation, order of the images, augmentation

    config.data = ml_collections.ConfigDict()
    config.data.name = ""  # a TFDS data set, "digits", or "folder"
    # Where TFDS keeps its data sets, "" for its own default; for "folder" what holds
    # <split>/<class>/<image>.
    config.data.dir = ""
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.image_size = 32  # height and width after cropping, pixels
    config.data.in_memory = False  # decode every image once and keep it
    config.data.workers = 0  # processes that decode, on each host; 0: threads
    config.data.broken_images = "stop"  # or "skip": leave them out, and count them
    config.data.mean = (0.0,)  # of the pixels in [0, 1], one number per channel
    config.data.std = (1.0,)
    config.data.augmentation = "none"  # "none", "shift" or "resized_crop"
    config.data.shift_pixels = 4  # for "shift": edge padding before the crop
    config.data.flip = False  # mirror half of the images

    config.model = ml_collections.ConfigDict()
    config.model.name = ""  # and the model's own arguments, see models/

    config.batch_size = 128  # over all devices together
    config.num_epochs = 160
    config.fine_tune_epochs = 10  # more epochs, with the mask fixed
    config.second_cycle = False  # then num_epochs again, mask fixed, rates rewound;
    # with "gmp", the LRR of ST-3's authors
    config.label_smoothing = 0.0
    config.accumulate_steps = 1  # parts that a batch is worked through in
    config.ema_decay = 0.0  # of a moving average of the weights, a step; 0: none
    config.not_finite = "stop"  # or "skip": such a gradient counts as zero

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4  # on kernels only
    config.optimizer.clip_norm = 3.0  # global norm of the gradient

    config.learning_rate = ml_collections.ConfigDict()
    config.learning_rate.peak = 0.1
    config.learning_rate.schedule = "step"  # "step" or "cosine"
    config.learning_rate.per_epoch = True  # changes once an epoch, else every step
    config.learning_rate.warmup_epochs = 0
    config.learning_rate.drop_epochs = (80, 120)  # for "step"
    config.learning_rate.drop_factor = 0.1
    config.learning_rate.fine_tune = 1e-3  # constant while fine-tuning

    config.sparsity = ml_collections.ConfigDict()
    # "none" (the dense network), "st3", "ste", "gmp", "lrr", "probmask", "granet",
    # "rigl", "set_" or "str_"
    config.sparsity.method = "st3"
    config.sparsity.final = 0.9  # share of all kernel weights that end as zero
    config.sparsity.begin_epoch = 5.0  # the ramp
    config.sparsity.end_epoch = 80.0
    config.sparsity.power = 3.0
    config.sparsity.criterion = "l1"  # "l1" or "l1_sigma"
    config.sparsity.distribution = "global"  # "global", "uniform" or "erk"
    config.sparsity.budget = "weights"  # final is a share of them; "multiply_adds"
    config.sparsity.layers = ()  # (path pattern, final) for each layer; else ()
    config.sparsity.dense = ()  # path patterns of kernels that stay dense
    config.sparsity.pattern = ""  # "", "N:M" such as "2:4", or "block"
    config.sparsity.block_shape = ()  # on the last axes of a kernel, for "block"
    config.sparsity.soft = True  # these three are ST-3's
    config.sparsity.rescale = True
    config.sparsity.straight_through = True
    config.sparsity.update_every_steps = 1

    config.gmp = ml_collections.ConfigDict()
    config.gmp.sticky = "no"  # "no", "strict" or "published"

    config.lrr = ml_collections.ConfigDict()
    config.lrr.keep = 0.8  # share of what is left that each pruning keeps

    config.probmask = ml_collections.ConfigDict()
    config.probmask.learning_rate = 6e-3  # of the probabilities, by Adam
    config.probmask.draw = "largest"  # the final mask; or "bernoulli"

    config.granet = ml_collections.ConfigDict()
    config.granet.drop = 0.5  # share of a layer's weights that an update replaces
    config.granet.initial = 0.0  # sparsity at the start; 0.5 is sparse-to-sparse

    config.rigl = ml_collections.ConfigDict()
    config.rigl.drop = 0.3
    config.rigl.end = 0.75  # share of the training after which the mask is fixed

    config.set_ = ml_collections.ConfigDict()
    config.set_.drop = 0.3

    config.str_ = ml_collections.ConfigDict()
    config.str_.initial = -3200.0  # its sigmoid is the first threshold
    config.str_.weight_decay = 2.2518e-5  # raises it, and so decides the sparsity

    # What a method's publication sets otherwise than that of ST-3; "ramp" stands for
    # begin_epoch and end_epoch, as shares of num_epochs.
    config.published = ml_collections.ConfigDict(
        {
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
    )

    config.log_every_steps = 100
    config.eval_every_epochs = 1
    config.eval_dense = True  # test the raw weights too, until the mask is fixed
    config.checkpoint_every_epochs = 5.0
    return config


def use_published(
    config: ml_collections.ConfigDict, given: Container[str] = ()
) -> ml_collections.ConfigDict:
    """Sets the fields that the method's publication sets otherwise.

    Args:
        config: A configuration; ``config.published`` says what is set otherwise.
        given: Fields, as in "sparsity.end_epoch", that stay what they are.

    Returns:
        The same configuration.
    """
    own = config.published.get(config.sparsity.method, ml_collections.ConfigDict())
    fields = dict(_flat(own))
    if "ramp" in fields:
        begin, end = fields.pop("ramp")
        fields["sparsity.begin_epoch"] = begin * config.num_epochs
        fields["sparsity.end_epoch"] = end * config.num_epochs
    for field, value in fields.items():
        if field not in given:
            config.update_from_flattened_dict({field: value})
    return config


def _flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The fields of nested configurations with dots in their names."""
    found = []
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
