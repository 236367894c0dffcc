"""ResNet-20 on CIFAR-10, 90 % zeros, with the published settings.

python experiments/train.py --config=experiments/cifar10_st3.py

Source: arXiv:2212.01076. BatchNorm keeps 0.99 of its running statistics a step; the
published code keeps the last batch's only.
"""

import ml_collections

import base_config


def get_config() -> ml_collections.ConfigDict:
    """270,896 kernel weights; 160 epochs, then 10 with the mask fixed."""
    config = base_config.get_config()
    config.data.name = "cifar10"
    config.data.in_memory = True
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.augmentation = "shift"
    config.data.flip = True

    config.model.name = "cifar_resnet"
    config.model.depth = 20
    config.model.norm_momentum = 0.99
    return config
