"""ResNet-8 on scikit-learn's digits, 90 % zeros: the default, ready to run.

python experiments/train.py --config=experiments/digits_st3.py
"""

import ml_collections

import base_config


def get_config() -> ml_collections.ConfigDict:
    """43,500 kernel weights, 1,438 training images of 8x8 pixels."""
    config = base_config.get_config()
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.in_memory = True
    config.data.mean = (0.305,)
    config.data.std = (0.376,)
    config.data.augmentation = "shift"

    config.model.name = "cifar_resnet"
    config.model.depth = 8
    config.model.width = 12
    config.model.norm_momentum = 0.9

    config.batch_size = 64
    config.num_epochs = 60
    config.label_smoothing = 0.1
    config.learning_rate.peak = 0.1
    config.learning_rate.schedule = "cosine"
    config.learning_rate.per_epoch = False

    common = config.defaults.common
    common.data.shift_pixels = 1
    common.fine_tune_epochs = 10
    common.learning_rate.fine_tune = 1e-3
    common.sparsity.begin_epoch = 3
    common.sparsity.end_epoch = 35
    common.str_.initial = -5.0  # few steps: from near the smallest weights, and faster
    common.str_.weight_decay = 5e-3
    config.defaults.granet.sparsity.update_every_steps = 22  # an epoch

    config.log_every_steps = 11
    config.eval_every_epochs = 2
    config.checkpoint_every_epochs = 10.0
    return config
