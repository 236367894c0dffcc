"""The method is the authors': recorded trajectories are met to rounding error."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import st3jax

GOLDEN = pathlib.Path(__file__).parent / "golden"
ST3 = ["st3", "st3_sigma", "st3_quadratic", "st3_fixed", "st3_no_rescale"]
METHODS = {
    "gmp": st3jax.gmp,
    "gmp_sticky": functools.partial(st3jax.gmp, sticky="published"),
    "ste_hard": st3jax.ste,
}
LAYERS = ("c1", "c2", "c3", "fc")
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def convolve(x, kernel, stride):
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def network(params, images):
    x = images
    for name, stride in (("c1", 1), ("c2", 2), ("c3", 1)):
        x = jax.nn.relu(convolve(x, params[name]["kernel"], stride))
    return x.mean((1, 2)) @ params["fc"]["kernel"]


def clip(max_norm):
    """Clipping to a global norm, with the published small constant."""

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def read(name):
    record = np.load(GOLDEN / f"{name}.npz")
    return record, ast.literal_eval(str(record["meta"]))


def train(name, record, meta):
    """Trains through the public API; yields (raw, effective, loss, opt_state)."""
    digits = np.load(GOLDEN / "digits.npz")
    params = {name: {"kernel": jnp.array(record[f"init/{name}"])} for name in LAYERS}
    ingredients = {} if name in METHODS else {k: meta[k] for k in ("soft", "rescale")}
    tx = METHODS.get(name, st3jax.st3)(
        optax.chain(
            clip(meta["clip_norm"]),
            optax.add_decayed_weights(meta["weight_decay"]),
            optax.sgd(meta["lr"], momentum=meta["momentum"]),
        ),
        sparsity=st3jax.polynomial_ramp(
            meta["sparsity"], meta["ramp_start"], meta["ramp_end"], meta["power"]
        ),
        criterion={"l1": "l1", "l1std": "l1_sigma"}[meta["criterion"]],
        freeze_step=meta["fix_at"],
        **ingredients,
    )
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, images, labels):
        def loss_fn(params):
            logits = network(st3jax.sparsify(params, opt_state), images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state_ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state_, loss

    for rows in record["batch_index"]:
        images, labels = digits["images"][rows], digits["labels"][rows]
        params, opt_state, loss = step(params, opt_state, images, labels)
        yield params, st3jax.finalize(params, opt_state), loss, opt_state


@pytest.mark.parametrize("name", [*ST3, *METHODS])
def test_trajectory(name):
    record, meta = read(name)
    fixed = meta["fix_at"] or len(record["batch_index"]) + 1
    close = {"rtol": TOLERANCE, "atol": 1e-13}
    for i, (raw, effective, loss, opt_state) in enumerate(train(name, record, meta)):
        step = i + 1
        state = st3jax.find_state(opt_state)
        np.testing.assert_allclose(loss, record["loss"][i], **close)
        zeros = st3jax.summary(effective)
        assert int(zeros.zeros) / zeros.weights == pytest.approx(
            record["zero_fraction"][i], abs=1e-15
        )
        if step < fixed:
            for layer in LAYERS:
                factor = st3jax.scores.score_factor(
                    state_criterion(meta), raw[layer]["kernel"].shape
                )
                t = state.thresholds[layer]["kernel"]
                expected = record["threshold"][i]
                if expected > 0:
                    np.testing.assert_allclose(t * factor, expected, **close)
                else:
                    assert t == expected
        for layer in LAYERS:
            if f"step{step}/raw/{layer}" not in record:
                continue
            w, w_eff = raw[layer]["kernel"], effective[layer]["kernel"]
            expected = record[f"step{step}/effective/{layer}"]
            np.testing.assert_allclose(w_eff, expected, **close)
            kept = expected != 0 if step >= fixed else np.ones_like(expected, bool)
            raw_expected = record[f"step{step}/raw/{layer}"]
            np.testing.assert_allclose(w[kept], raw_expected[kept], **close)
            if step >= fixed:
                continue
            t = state.thresholds[layer]["kernel"]
            layer_threshold = record[f"step{step}/layer_threshold/{layer}"]
            np.testing.assert_allclose(t, layer_threshold, **close)
            if meta["rescale"]:
                scale = st3jax.ops.channel_scale(w, t)
                np.testing.assert_allclose(
                    scale, record[f"step{step}/scale/{layer}"], **close
                )


def state_criterion(meta):
    return {"l1": "l1", "l1std": "l1_sigma"}[meta["criterion"]]
