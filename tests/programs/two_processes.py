"""One process of two, with two devices each: thresholds over parameters of both.

python tests/programs/two_processes.py ADDRESS PROCESS

Prints the bits of the thresholds that this process ends with.
"""

import sys

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import st3jax
from st3jax.selection.quantile import threshold

PARAMS = {
    "columns": {"kernel": np.random.default_rng(0).standard_normal((64, 512), "f4")},
    "rows": {"kernel": np.random.default_rng(1).standard_normal((256, 32), "f4")},
}
SPECS = {"columns": {"kernel": P(None, "i")}, "rows": {"kernel": P("i")}}


def train(params):
    """Five steps in which every product is exact, so that no order of sums matters."""
    ramp = st3jax.polynomial_ramp(0.9, begin=0, end=5)
    tx = st3jax.st3(optax.sgd(0.125, momentum=0.5), ramp, rescale=False)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        weights = st3jax.sparsify(params, opt_state)
        grads = jax.tree.map(lambda w: w / 2, weights)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(5):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def bits(params, opt_state):
    """Every threshold there is, as hexadecimal numbers."""
    one_shot = [jax.jit(threshold)(params, f) for f in (0.0, 0.3, 0.95, 1.0)]
    values = [*jax.tree.leaves(opt_state.thresholds), *one_shot]
    return " ".join(float(value).hex() for value in values)


def main():
    """Joins the other process and trains on the devices of both."""
    address, process = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(process))
    assert jax.device_count() == 4
    assert jax.local_device_count() == 2
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    print(bits(*train(jax.tree.map(place, PARAMS, SPECS))))


if __name__ == "__main__":
    main()
