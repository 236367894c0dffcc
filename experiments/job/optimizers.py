"""The optimizer of a configuration: weight decay, SGD, sparse-training method."""

import ml_collections
import optax

import st3jax
from job.methods import METHODS
from job.rates import learning_rate

__all__ = ["make_optimizer"]


def make_optimizer(
    config: ml_collections.ConfigDict,
    steps_per_epoch: int,
    costs: dict[str, int],
    layouts: dict[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Weight decay on kernels and SGD, behind clipping, wrapped in the asked method.

    Args:
        config: The experiment's configuration.
        steps_per_epoch: Optimizer steps in an epoch.
        costs: From path to the multiply-adds of one weight.
        layouts: From path to what each axis of a kernel is.

    Returns:
        The optimizer of the whole run.
    """
    sgd = config.optimizer
    inner = optax.chain(
        optax.add_decayed_weights(sgd.weight_decay, mask=st3jax.kernel_mask),
        optax.sgd(learning_rate(config, steps_per_epoch), momentum=sgd.momentum),
    )
    return METHODS[config.sparsity.method].make(
        inner, config, steps_per_epoch, costs, layouts
    )
