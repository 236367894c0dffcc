"""ResNet-8 on Fashion-MNIST, 95 % zeros: real images.

apt-get install dataset-fashion-mnist
python experiments/prepare.py --name=fashion_mnist
python experiments/train.py --config=experiments/fashion_mnist_st3.py
"""

import ml_collections

import base_config


def get_config() -> ml_collections.ConfigDict:
    """77,072 kernel weights, 60,000 training images of 28x28 pixels."""
    config = base_config.get_config()
    config.data.name = "fashion_mnist"
    config.data.image_size = 28
    config.data.in_memory = True
    config.data.mean = (0.286,)
    config.data.std = (0.353,)
    config.data.augmentation = "shift"
    config.data.flip = True

    config.model.name = "cifar_resnet"
    config.model.depth = 8
    config.model.width = 16
    config.model.stem_stride = 2
    config.model.norm_momentum = 0.9

    config.batch_size = 128
    config.num_epochs = 5
    config.learning_rate.peak = 0.2  # of 0.05, 0.1, 0.2 and 0.4 for the dense network
    config.learning_rate.schedule = "cosine"
    config.learning_rate.per_epoch = False

    common = config.defaults.common
    common.data.shift_pixels = 2
    common.fine_tune_epochs = 1
    common.learning_rate.fine_tune = 1e-3
    common.sparsity.final = 0.95
    common.sparsity.begin_epoch = 0.5
    common.sparsity.end_epoch = 3.0
    common.str_.initial = -5.0  # few steps: from near the smallest weights, and faster
    common.str_.weight_decay = 5e-3
    config.defaults.granet.sparsity.update_every_steps = 100

    config.log_every_steps = 39
    config.checkpoint_every_epochs = 1.0
    return config
