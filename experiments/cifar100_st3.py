"""WideResNet-34-2 on CIFAR-100, 90 % zeros, with the published settings.

python experiments/train.py --config=experiments/cifar100_st3.py

Source: arXiv:2212.01076.
"""

import ml_collections

import cifar10_st3


def get_config() -> ml_collections.ConfigDict:
    """The CIFAR-10 settings with a wider network."""
    config = cifar10_st3.get_config()
    config.data.name = "cifar100"
    config.data.mean = (0.5071, 0.4865, 0.4409)
    config.data.std = (0.2673, 0.2564, 0.2762)

    config.model.name = "wide_resnet"
    config.model.depth = 34
    config.model.widen = 2
    config.model.dropout = 0.2
    config.model.norm_momentum = 0.99
    return config
