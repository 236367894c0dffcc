"""Every field that a configuration has, with its unit; experiments override some.

Durations carry their unit in their name. Fractions are in [0, 1].

A field that is of use to some methods or settings only is ``None`` here. Whoever sets
it, in a file, on the command line or from Python, has it so, and is told if it does
nothing. While it is ``None`` it has the value of ``config.defaults``: what the method's
publication says, else what all methods share.
"""

import ml_collections
from ml_collections.config_dict import placeholder

__all__ = ["get_config"]


def get_config() -> ml_collections.ConfigDict:
    """The fields, and the most common values of those that are of use to all."""
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
    config.data.workers = placeholder(int)  # processes that decode, else, on each host
    config.data.broken_images = "stop"  # or "skip": leave them out, and count them
    config.data.max_pixels = 64_000_000  # most pixels of an image, by its header
    config.data.mean = (0.0,)  # of the pixels in [0, 1], one number per channel
    config.data.std = (1.0,)
    config.data.augmentation = "none"  # "none", "shift" or "resized_crop"
    config.data.shift_pixels = placeholder(int)  # "shift": edge padding before the crop
    config.data.flip = False  # mirror half of the images

    config.model = ml_collections.ConfigDict()
    config.model.name = ""  # see models/; it has some of these, and its own defaults
    config.model.depth = placeholder(int)  # layers, as the network is named
    config.model.width = placeholder(int)  # channels of the first stage
    config.model.multiplier = placeholder(float)  # of the published channels
    config.model.widen = placeholder(int)  # k of WideResNet-n-k
    config.model.stem_stride = placeholder(int)
    config.model.dropout = placeholder(float)  # rate
    config.model.norm_momentum = placeholder(float)  # of BatchNorm, a step
    config.model.dtype = placeholder(str)  # of the computation, such as "bfloat16"

    config.batch_size = 128  # over all devices together
    config.num_epochs = 160
    config.fine_tune_epochs = placeholder(int)  # more epochs, with the mask fixed
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
    config.learning_rate.warmup_epochs = placeholder(int)  # for "cosine"
    config.learning_rate.drop_epochs = placeholder(tuple)  # for "step"
    config.learning_rate.drop_factor = placeholder(float)  # for "step"
    config.learning_rate.fine_tune = placeholder(float)  # constant while fine-tuning

    config.sparsity = ml_collections.ConfigDict()
    # "none" (the dense network), "st3", "ste", "gmp", "lrr", "probmask", "granet",
    # "rigl", "set_" or "str_". job/methods.py says which has which of the fields below.
    config.sparsity.method = "st3"
    config.sparsity.final = placeholder(float)  # share of zeros at the end
    config.sparsity.begin_epoch = placeholder(float)  # the ramp
    config.sparsity.end_epoch = placeholder(float)
    config.sparsity.power = placeholder(float)
    config.sparsity.criterion = placeholder(str)  # "l1" or "l1_sigma"
    config.sparsity.distribution = placeholder(str)  # "global", "uniform" or "erk"
    # What final is a share of: "weights", those of all kernels, or "multiply_adds".
    config.sparsity.budget = placeholder(str)
    # (path, final) for each layer, in place of final; the first path that matches
    # counts, and "*" in it stands for anything.
    config.sparsity.layers = placeholder(tuple)
    config.sparsity.dense = placeholder(tuple)  # paths of kernels that stay dense
    # "" for any weights, N:M such as "2:4", or a block on a kernel's last axes, "4x8".
    config.sparsity.pattern = placeholder(str)
    config.sparsity.soft = placeholder(bool)  # these three are ST-3's
    config.sparsity.rescale = placeholder(bool)
    config.sparsity.straight_through = placeholder(bool)
    config.sparsity.update_every_steps = placeholder(int)

    config.gmp = ml_collections.ConfigDict()
    config.gmp.sticky = placeholder(str)  # "no", "strict" or "published"

    config.lrr = ml_collections.ConfigDict()
    config.lrr.keep = placeholder(float)  # share of what is left that a pruning keeps

    config.probmask = ml_collections.ConfigDict()
    config.probmask.learning_rate = placeholder(float)  # of the probabilities, by Adam
    config.probmask.draw = placeholder(str)  # final mask: "largest" or "bernoulli"

    config.granet = ml_collections.ConfigDict()
    config.granet.drop = placeholder(float)  # share of a layer that an update replaces
    config.granet.initial = placeholder(float)  # sparsity at the start

    config.rigl = ml_collections.ConfigDict()
    config.rigl.drop = placeholder(float)
    config.rigl.end = placeholder(float)  # share of training until the mask is fixed

    config.set_ = ml_collections.ConfigDict()
    config.set_.drop = placeholder(float)

    config.str_ = ml_collections.ConfigDict()
    config.str_.initial = placeholder(float)  # its sigmoid is the first threshold
    config.str_.weight_decay = placeholder(float)  # raises it: decides the sparsity

    config.log_every_steps = 100
    config.eval_every_epochs = 1
    config.eval_dense = placeholder(bool)  # test raw weights too, until they are fixed
    config.checkpoint_every_epochs = 5.0

    config.defaults = ml_collections.ConfigDict(DEFAULTS)
    return config


DEFAULTS = {
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
