"""Bad use fails before anything is compiled, with a sentence that helps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import st3jax
import st3jax.nnx
from st3jax.selection.quantile import threshold

SGD = optax.sgd(0.1)
KERNEL, BIAS = jnp.ones((2, 3)), jnp.ones(3)
PARAMS = {"Dense_0": {"kernel": KERNEL, "bias": BIAS}, "head": {"kernel": KERNEL}}
RENAMED = {"Dense_0": PARAMS["Dense_0"], "output": PARAMS["head"]}
FEWER = {"Dense_0": PARAMS["Dense_0"]}
MORE = {**PARAMS, "tail": {"kernel": KERNEL}}
SPLIT = {**PARAMS, "head": {"kernel": {"low": KERNEL, "high": KERNEL}}}
RAMP = st3jax.polynomial_ramp(0.9, begin=0, end=10)

OTHER_PARAMS = "not have the structure that the optimizer state was initialised with"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "activation"],
    meta_fields=[],
)
@dataclasses.dataclass
class Module:
    """A module as Equinox has them: a pytree with functions among its leaves."""

    weight: object
    activation: object


MODULE, ARRAYS = Module(KERNEL, jax.nn.relu), Module(KERNEL, None)


def module_in_place_of_its_arrays(function):
    tx = st3jax.st3(SGD, 0.5, prunable=lambda path, leaf: True, layout={"*": "oi"})
    return lambda: function(tx, tx.init(ARRAYS))


def st3(sparsity=0.5, **options):
    return functools.partial(st3jax.st3, SGD, sparsity, **options)


def ramp(final=0.9, begin=0, end=10, **options):
    return functools.partial(st3jax.polynomial_ramp, final, begin, end, **options)


def init(params, **options):
    return lambda: st3jax.st3(SGD, 0.5, **options).init(params)


def update(params, grads=PARAMS):
    """Traces an update with other params than those of init, compiling nothing."""
    tx = st3jax.st3(SGD, 0.5)
    return lambda: jax.eval_shape(tx.update, grads, tx.init(PARAMS), params)


def sparsify(params, tx=None):
    tx = tx or st3jax.st3(SGD, 0.5)
    return lambda: jax.eval_shape(st3jax.sparsify, params, tx.init(PARAMS))


def prune(sparsity, params=PARAMS, **options):
    return lambda: st3jax.prune(params, sparsity, **options)


def traced(function, fraction):
    return lambda: jax.eval_shape(function, PARAMS, jnp.asarray(fraction))


def on_nnx(function, tx):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return lambda: function(model, optimizer)


def two_of_them():
    return optax.chain(st3jax.st3(SGD, 0.5), st3jax.st3(SGD, 0.5))


def one_in_another():
    return st3jax.st3(st3jax.st3(SGD, 0.5), 0.5)


TWO = ("holds 2 sparse-training states", "only one")
NONE = ("holds no sparse-training state", "st3jax.st3(optax.sgd(0.1), sparsity=0.9)")
NOT_PRUNABLE = ("no parameter is prunable", "prunable=lambda path, leaf")
FILTER = (OTHER_PARAMS, "'activation' is no array", "eqx.filter(model, ")
WEIGHT = ("'0/weight'", 'path.endswith("weight") and leaf.ndim >= 2', "embeddings")
NOT_FLOAT = ("only floating-point weights can be pruned", "prunable=")
EMPTY = ("no score", "empty")

BAD_USES = [
    # The asked sparsity
    ("above 1", st3(1.5), ValueError, "sparsity", "[0, 1]", "1.5"),
    ("below 0", st3(-0.1), ValueError, "sparsity", "[0, 1]", "-0.1"),
    ("percent", st3(90), ValueError, "sparsity", "[0, 1]", "90", "0.9"),
    ("percent array", st3(jnp.array(90)), ValueError, "[0, 1]", "90", "0.9"),
    ("infinite", st3(np.inf), ValueError, "sparsity", "[0, 1]", "inf"),
    ("not a number", st3(np.nan), ValueError, "sparsity", "[0, 1]", "nan"),
    ("a word", st3("high"), TypeError, "sparsity", "number in [0, 1]", "'high'"),
    ("None", st3(None), TypeError, "sparsity", "number in [0, 1]", "None"),
    ("True", st3(True), TypeError, "sparsity", "number in [0, 1]", "True"),
    ("numpy True", st3(np.True_), TypeError, "number in [0, 1]", "True"),
    ("JAX True", st3(jnp.array(True)), TypeError, "number in [0, 1]", "True"),
    ("an array", st3(jnp.ones(2)), TypeError, "number in [0, 1]", "Array([1., 1.]"),
    ("a list", st3([0.5, 0.9]), TypeError, "number in [0, 1]", "[0.5, 0.9]"),
    ("complex", st3(1j), TypeError, "sparsity", "number in [0, 1]", "1j"),
    # Schedules
    ("percent schedule", st3(lambda step: 90), ValueError, "schedule", "90", "0.9"),
    (
        "schedule to percent",
        st3(optax.linear_schedule(0, 90, 100)),
        ValueError,
        "final value of the sparsity schedule",
        "90",
        "0.9",
    ),
    ("schedule of None", st3(lambda step: None), TypeError, "schedule", "None"),
    (
        "schedule of arrays",
        st3(lambda step: np.ones(2)),
        TypeError,
        "schedule",
        "array",
    ),
    ("end before begin", ramp(begin=10, end=5), ValueError, "step 5", "step 10"),
    ("end at begin", ramp(begin=10), ValueError, "step 10", "pass the number itself"),
    ("negative begin", ramp(begin=-3), ValueError, "begin", "0 or more", "-3"),
    ("fractional begin", ramp(begin=0.5), TypeError, "begin", "whole number", "0.5"),
    ("fractional end", ramp(end=10.5), TypeError, "end", "whole number", "10.5"),
    ("infinite end", ramp(end=np.inf), TypeError, "end", "whole number", "inf"),
    ("begin is None", ramp(begin=None), TypeError, "begin", "whole number", "None"),
    ("power 0", ramp(power=0), ValueError, "power", "above 0", "0"),
    ("power below 0", ramp(power=-2), ValueError, "power", "above 0", "-2"),
    ("power not a number", ramp(power=np.nan), ValueError, "power", "above 0", "nan"),
    ("power a word", ramp(power="cubic"), TypeError, "power", "above 0", "'cubic'"),
    ("final above 1", ramp(1.2), ValueError, "final sparsity", "[0, 1]", "1.2"),
    ("final in percent", ramp(90), ValueError, "final sparsity", "[0, 1]", "0.9"),
    # Options
    ("criterion", st3(criterion="l2"), ValueError, "criterion", "'l1'", "'l1_sigma'"),
    ("criterion l2", st3(criterion="l2"), ValueError, "got 'l2'"),
    ("no criterion", st3(criterion=None), ValueError, "criterion", "'l1'", "None"),
    ("every 0", st3(update_every=0), ValueError, "update_every", "1 or more", "0"),
    ("every -1", st3(update_every=-1), ValueError, "update_every", "1 or more", "-1"),
    ("every 1.5", st3(update_every=1.5), TypeError, "update_every", "whole", "1.5"),
    ("every None", st3(update_every=None), TypeError, "update_every", "whole", "None"),
    ("every True", st3(update_every=True), TypeError, "update_every", "whole", "True"),
    ("freeze 0", st3(freeze_step=0), ValueError, "freeze_step", "1 or more", "0"),
    ("freeze -5", st3(freeze_step=-5), ValueError, "freeze_step", "1 or more", "-5"),
    ("freeze 0.5", st3(freeze_step=0.5), TypeError, "freeze_step", "whole", "0.5"),
    (
        "freeze in the ramp",
        st3(RAMP, freeze_step=5),
        ValueError,
        "freeze_step 5",
        "before the ramp is over",
        "0.7875 then and 0.9 at the end",
    ),
    ("predicate a name", st3(prunable="kernel"), TypeError, "prunable", "'kernel'"),
    ("predicate True", st3(prunable=True), TypeError, "prunable", "True"),
    # The optimizer
    (
        "a learning rate",
        lambda: st3jax.st3(0.1, 0.9),
        TypeError,
        "the optimizer to wrap",
        "optax.sgd(0.1)",
        "float",
    ),
    (
        "not called",
        lambda: st3jax.st3(optax.sgd, 0.9),
        TypeError,
        "the optimizer to wrap",
        "function",
    ),
    ("no optimizer", lambda: st3jax.st3(None, 0.9), TypeError, "to wrap", "NoneType"),
    # The parameters
    ("no kernels", init({"scale": BIAS}), ValueError, *NOT_PRUNABLE, "scale"),
    (
        "nothing chosen",
        init(PARAMS, prunable=lambda path, leaf: False),
        ValueError,
        *NOT_PRUNABLE,
        "Dense_0/kernel",
    ),
    ("empty params", init({}), ValueError, *NOT_PRUNABLE, "none at all"),
    ("params None", init(None), ValueError, *NOT_PRUNABLE, "none at all"),
    (
        "kernels called weight",
        init([Module(KERNEL, BIAS)]),
        ValueError,
        *NOT_PRUNABLE,
        *WEIGHT,
    ),
    (
        "integers",
        init({"kernel": jnp.ones((2, 2), int)}),
        TypeError,
        "'kernel'",
        "int32",
    ),
    ("integers out", init({"kernel": jnp.ones((2, 2), int)}), TypeError, *NOT_FLOAT),
    (
        "complex numbers",
        init({"kernel": jnp.ones((2, 2), complex)}),
        TypeError,
        "'kernel'",
        "complex64",
        *NOT_FLOAT,
    ),
    (
        "one name twice",
        init({"a": {"kernel": KERNEL}, "a/kernel": KERNEL}),
        ValueError,
        "'a/kernel'",
    ),
    (
        "update without params",
        update(None),
        ValueError,
        "needs them",
        "tx.update(grads, opt_state, params)",
    ),
    ("update renamed", update(RENAMED), ValueError, OTHER_PARAMS, "'head/kernel'"),
    (
        "update wrapped",
        update({"params": PARAMS}),
        ValueError,
        OTHER_PARAMS,
        "'Dense_0/kernel'",
        "params/Dense_0",
    ),
    ("update fewer", update(FEWER), ValueError, OTHER_PARAMS, "'head/kernel'"),
    ("update more", update(MORE), ValueError, OTHER_PARAMS, "other leaves"),
    ("update split", update(SPLIT), ValueError, OTHER_PARAMS, "'head/kernel'"),
    ("sparsify renamed", sparsify(RENAMED), ValueError, OTHER_PARAMS, "'head/kernel'"),
    (
        "sparsify wrapped",
        sparsify({"params": PARAMS}),
        ValueError,
        OTHER_PARAMS,
        "'Dense_0/kernel'",
        "params/Dense_0",
    ),
    ("sparsify fewer", sparsify(FEWER), ValueError, OTHER_PARAMS, "'head/kernel'"),
    ("sparsify more", sparsify(MORE), ValueError, OTHER_PARAMS, "tail/kernel"),
    ("sparsify split", sparsify(SPLIT), ValueError, OTHER_PARAMS, "'head/kernel'"),
    ("sparsify None", sparsify(None), ValueError, OTHER_PARAMS, "none at all"),
    (
        "sparsify a module with functions",
        module_in_place_of_its_arrays(lambda tx, state: st3jax.sparsify(MODULE, state)),
        ValueError,
        *FILTER,
    ),
    (
        "update a module with functions",
        module_in_place_of_its_arrays(lambda tx, s: tx.update(ARRAYS, s, MODULE)),
        ValueError,
        *FILTER,
    ),
    # The optimizer state
    ("no method", sparsify(PARAMS, SGD), ValueError, *NONE),
    ("state None", lambda: st3jax.sparsify(PARAMS, None), ValueError, *NONE),
    ("two methods", sparsify(PARAMS, two_of_them()), ValueError, *TWO),
    ("nested methods", sparsify(PARAMS, one_in_another()), ValueError, *TWO),
    ("NNX without", on_nnx(st3jax.nnx.sparsify, SGD), ValueError, *NONE),
    ("NNX finalize", on_nnx(st3jax.nnx.finalize, SGD), ValueError, *NONE),
    (
        "an NNX model in the wrong function",
        on_nnx(st3jax.sparsify, st3jax.st3(SGD, 0.5)),
        (TypeError, ValueError),
        "st3jax.nnx",
    ),
    # Selection and one-shot pruning
    ("threshold of nothing", lambda: threshold({}, 0.5), ValueError, *EMPTY),
    (
        "threshold of empty arrays",
        lambda: threshold([jnp.ones((0, 3))], 0.5),
        ValueError,
        *EMPTY,
    ),
    (
        "threshold above 1",
        lambda: threshold(PARAMS, 1.5),
        ValueError,
        "fraction",
        "[0, 1]",
        "1.5",
    ),
    (
        "threshold of integers",
        lambda: threshold(jnp.arange(3), 0.5),
        TypeError,
        "int32",
    ),
    ("traced fractions", traced(threshold, [0.5, 0.9]), TypeError, "[0, 1]", "(2,)"),
    ("prune no weights", prune(0.5, {"kernel": jnp.ones((0, 2))}), ValueError, *EMPTY),
    ("prune percent", prune(90), ValueError, "sparsity", "[0, 1]", "90", "0.9"),
    ("prune a word", prune("high"), TypeError, "sparsity", "[0, 1]", "'high'"),
    ("prune by a ramp", prune(RAMP), TypeError, "sparsity", "number in [0, 1]"),
    ("prune traced", traced(st3jax.prune, [0.5, 0.9]), TypeError, "sparsity", "(2,)"),
    ("prune by l2", prune(0.5, criterion="l2"), ValueError, "'l1_sigma'", "'l2'"),
    ("prune nothing", prune(0.5, {"scale": BIAS}), ValueError, *NOT_PRUNABLE),
    (
        "prune integers",
        prune(0.5, {"kernel": np.eye(2, dtype=int)}),
        TypeError,
        *NOT_FLOAT,
    ),
    # Scores in place of magnitudes
    (
        "no scores of a leaf",
        prune(0.5, scores=FEWER),
        ValueError,
        "no leaf 'head/kernel'",
        "'Dense_0/bias'",
        "prunable=",
    ),
    (
        "no scores at all",
        prune(0.5, scores={}),
        ValueError,
        "no leaf 'Dense_0/kernel'",
        "none at all",
    ),
    (
        "scores of another shape",
        prune(0.5, scores={**PARAMS, "head": {"kernel": KERNEL.T}}),
        ValueError,
        "'head/kernel'",
        "(3, 2)",
        "(2, 3)",
    ),
    (
        "one score for all",
        prune(0.5, scores={**PARAMS, "head": {"kernel": 1.0}}),
        ValueError,
        "'head/kernel'",
        "()",
        "(2, 3)",
    ),
    (
        "whole scores",
        prune(0.5, scores={**PARAMS, "head": {"kernel": KERNEL.astype(int)}}),
        TypeError,
        "the scores of 'head/kernel'",
        "int32",
        "astype",
    ),
    (
        "scores and sigma",
        prune(0.5, scores=PARAMS, criterion="l1_sigma"),
        ValueError,
        "'l1_sigma'",
        "scores=",
        "leave out one",
    ),
    (
        "no zeros to hold",
        lambda: st3jax.hold_zeros(SGD).init(PARAMS),
        ValueError,
        "none in 2 prunable leaves",
        "st3jax.prune(params, 0.9)",
    ),
    (
        "summary of nothing",
        lambda: st3jax.summary({"scale": BIAS}),
        ValueError,
        *NOT_PRUNABLE,
    ),
]


@pytest.mark.parametrize("row", BAD_USES, ids=[row[0] for row in BAD_USES])
def test_bad_use_is_explained_in_one_short_sentence(row):
    _, bad_use, error, *texts = row
    with pytest.raises(error) as caught:
        bad_use()
    message = str(caught.value)
    assert [text for text in texts if text not in message] == []
    assert "\n" not in message
    assert len(message) < 320


@pytest.mark.parametrize("part", ["model", "state", "a param", "a tree of params"])
def test_nnx_is_named_where_nnx_was_given(part):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = {
        "model": model,
        "state": nnx.state(model),
        "a param": model.kernel,
        "a tree of params": {"head": {"kernel": model.kernel}},
    }[part]
    with pytest.raises(ValueError, match="NNX models have st3jax"):
        sparsify(params)()


@pytest.mark.parametrize("params", [FEWER, MORE, None, ARRAYS, [KERNEL], {"f": abs}])
def test_nnx_is_not_named_where_it_was_not_given(params):
    opt_state = st3jax.st3(SGD, 0.5).init(PARAMS)
    with pytest.raises(ValueError, match=OTHER_PARAMS) as caught:
        st3jax.sparsify(params, opt_state)
    assert "NNX" not in str(caught.value)


def test_nothing_is_compiled_before_params_are_refused():
    tx = st3jax.st3(SGD, 0.5)
    opt_state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="'head/kernel'"):
        jax.jit(tx.update).lower(RENAMED, opt_state, RENAMED)
    with pytest.raises(ValueError, match="'head/kernel'"):
        jax.jit(st3jax.sparsify).lower(RENAMED, opt_state)
