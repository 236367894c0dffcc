"""Every field that a configuration has, with its unit; experiments override some.

Durations carry their unit in their name. Fractions are in [0, 1].
"""

import ml_collections


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
    config.second_cycle = False  # then num_epochs again, mask fixed, rates rewound
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
    config.sparsity.method = "st3"  # "st3", or "none" for the dense network
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
    config.sparsity.soft = True
    config.sparsity.rescale = True
    config.sparsity.update_every_steps = 1

    config.log_every_steps = 100
    config.eval_every_epochs = 1
    config.eval_dense = True  # test the raw weights too, until the mask is fixed
    config.checkpoint_every_epochs = 5.0
    return config
