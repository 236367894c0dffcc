"""From a network in JAX to an ONNX model: one walk over the traced computation.

What does not depend on the images is computed on the way, calls are written where they
stand, and a scan over stacked layers becomes its layers. The batch is symbolic, so the
model takes any. Names are those of the parameters.

Why a writer of our own: jax2onnx 0.17 drops the explicit padding of max-pooling without
a word, annotates arrays with wrong shapes, and cannot be installed beside today's
Orbax. These networks need some 30 primitives.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np
import onnx
from jax import export as jax_export

from errors import UserError
from paths import by_path
from shipping.agreement import any_batch
from shipping.network import Network
from shipping.onnx_folding import fold
from shipping.onnx_graph import Graph, Known, Shape, Tensor, Value, shape_of
from shipping.onnx_primitives import PRIMITIVES

__all__ = ["Written", "to_onnx", "write"]

OPSET, IR_VERSION = 20, 10
CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
    *("remat", "remat2", "checkpoint"),
)
"""Primitives that only call what is inside."""
MOVES = ("reshape", "transpose", "squeeze", "convert_element_type")
"""Primitives that leave a parameter what it is."""


class Written(NamedTuple):
    """A model, and what is what in it.

    Attributes:
        model: The ONNX model.
        sources: From the name of an initializer to the path of the variable that it
            holds, or holds one layer of.
        steps: What was computed, in order: the primitive and the array that it gave.
    """

    model: onnx.ModelProto
    sources: dict[str, str]
    steps: list[tuple[str, Tensor]]


def to_onnx(network: Network) -> onnx.ModelProto:
    """The network as an ONNX model, from ``images`` [batch, ...] to ``logits``.

    BatchNorm is folded into convolutions, zeros are exact and positive, and
    ``onnx.checker`` has checked all that it can.

    Raises:
        UserError: If there is nothing in ONNX for what the network does, or it takes
            no batch of any size.
    """
    model = write(network).model
    onnx.checker.check_model(model, full_check=True)
    return model


def write(network: Network, expecting: bool = False) -> Written:
    """The network as an ONNX model, with what is what in it.

    Args:
        network: What to write.
        expecting: Whether each step has what JAX computes for ``network.images``. The
            model is then for a batch of their number.

    Raises:
        UserError: As ``to_onnx`` does.
    """
    (batch,) = jax_export.symbolic_shape("b")
    count = len(network.images) if expecting else batch
    images = jax.ShapeDtypeStruct((count, *network.images.shape[1:]), np.float32)
    shape = shape_of(images)
    given = Tensor("images", shape, tuple(range(len(shape))))
    if expecting:
        given = given._replace(expected=network.images)
    walk = _Walk()
    walk.graph.shapes["images"] = shape
    for name in ("images", "logits"):
        walk.graph.unique(name)
    with jax.default_matmul_precision("highest"):
        results = walk.inside(_traced(network, images), [*_parameters(network), given])
    if len(results) != 1:
        raise UserError(
            f"the network gives {len(results)} arrays, and an export has one: let "
            "apply return the logits alone"
        )
    (result,) = results
    if isinstance(result, Known):
        raise UserError("the network gives the same for all images: nothing to export")
    return _finished(walk, network, shape, result)


def _traced(network: Network, images: jax.ShapeDtypeStruct) -> jex.ClosedJaxpr:
    """The network's computation.

    Raises:
        UserError: If it is not one for any batch.
    """
    with any_batch():
        return jax.make_jaxpr(network.apply)(network.variables, images)


def _parameters(network: Network) -> list[Value]:
    """The variables, each with its path, without the collection that it is in."""
    return [
        Known(np.asarray(x), re.sub("^(params|batch_stats)/", "", path), path)
        for path, x in by_path(network.variables).items()
    ]


def _finished(walk: "_Walk", network: Network, shape: Shape, result: Tensor) -> Written:
    """The model of what was walked through, whose result is ``logits``."""
    graph = walk.graph
    graph.place = ""
    end = fold(graph, graph.ordered(result, range(len(result.shape))))
    for node in graph.nodes:
        node.input[:] = ["logits" if x == end else x for x in node.input]
        node.output[:] = ["logits" if x == end else x for x in node.output]
    steps = [
        (what, x._replace(name="logits") if x.name == end else x)
        for what, x in walk.steps
    ]
    model = _model(graph, network, shape, result.shape)
    return Written(model, graph.sources, steps)


def _model(
    graph: Graph,
    network: Network,
    images: Shape,
    logits: Shape,
) -> onnx.ModelProto:
    """The model of a graph."""

    def described(name: str, shape: Shape) -> onnx.ValueInfoProto:
        sizes = ["batch" if isinstance(n, str) else n for n in shape]
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)

    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            network.name,
            [described("images", images)],
            [described("logits", logits)],
            [onnx.numpy_helper.from_array(x, k) for k, x in graph.constants.items()],
        ),
        producer_name="st3jax",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    )
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in network.metadata.items()
    }
    onnx.helper.set_model_props(model, texts)
    return model


class _Walk:
    """What one walk has found.

    Attributes:
        graph: What has been written.
        steps: As in ``Written``.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.steps: list[tuple[str, Tensor]] = []

    def inside(self, closed: Any, given: list[Value]) -> list[Value]:
        """Writes a jaxpr, and gives its results."""
        jaxpr = getattr(closed, "jaxpr", closed)
        known: dict[Any, Value] = {
            variable: Known(np.asarray(array))
            for variable, array in zip(
                jaxpr.constvars, getattr(closed, "consts", []), strict=True
            )
        }
        known.update(zip(jaxpr.invars, given, strict=True))

        def value(atom: Any) -> Value:
            if isinstance(atom, jex.Var):
                return known[atom]
            return Known(np.asarray(atom.val, atom.aval.dtype))

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, list(map(value, eqn.invars)))
            known.update(zip(eqn.outvars, results, strict=True))
        return list(map(value, jaxpr.outvars))

    def equation(self, eqn: jex.JaxprEqn, given: list[Value]) -> list[Value]:
        """What one equation gives, with all that is inside it."""
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, given)
        if name in CALLS:
            return self.inside(
                eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), given
            )
        if all(isinstance(x, Known) for x in given):
            return self.known(eqn, given)
        self.graph.place = self.place(given)
        if name not in PRIMITIVES:
            raise self.unknown(eqn, f"{name!r}")
        try:
            result = PRIMITIVES[name](self.graph, eqn, *given)
        except NotImplementedError as error:
            raise self.unknown(eqn, f"{error} ({name!r})") from None
        if any(isinstance(x, Tensor) and x.expected is not None for x in given):
            values = [x.array if isinstance(x, Known) else x.expected for x in given]
            result = result._replace(expected=_computed(eqn, values)[0])
        self.steps.append((name, result))
        return [result]

    def place(self, given: Iterable[Value]) -> str:
        """Where in the network an equation is: at its parameters, or after others."""
        paths = [x.path for x in given if isinstance(x, Known) and x.path]
        return paths[0].rpartition("/")[0] if paths else self.graph.place

    def unknown(self, eqn: jex.JaxprEqn, what: str) -> UserError:
        """What to say of an equation that cannot be written."""
        after = f" at or after {self.graph.place!r}" if self.graph.place else ""
        stack = str(eqn.source_info.name_stack)
        return UserError(
            f"the export to ONNX does not know {what}, which the network has{after}"
            f"{f' (in {stack})' if stack else ''}: PRIMITIVES in "
            "experiments/shipping/onnx_primitives.py has those that it knows"
        )

    def known(self, eqn: jex.JaxprEqn, given: list[Any]) -> list[Value]:
        """What does not depend on the images is computed at once."""
        name = eqn.primitive.name
        results: list[Any] = [x.aval for x in eqn.outvars]
        if any(jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) for x in results):
            raise self.unknown(eqn, f"a random key ({name!r})")
        sized = any(isinstance(n, str) for x in results for n in shape_of(x))
        if sized or name == "dim_as_value":
            raise self.unknown(eqn, f"a constant with the batch's size ({name!r})")
        path = next((x.path for x in given if x.path), "")
        source = given[0].source if name in MOVES else ""
        computed = _computed(eqn, [x.array for x in given])
        return [Known(np.asarray(result), path, source) for result in computed]

    def scan(self, eqn: jex.JaxprEqn, given: list[Value]) -> list[Value]:
        """Its turns, one after the other."""
        params = eqn.params
        if "ft_in" in params:  # JAX 0.11 and newer
            consts, carried, _ = map(len, params["ft_in"].unpack())
        else:
            consts, carried = params["num_consts"], params["num_carry"]
        carry, stacked = given[consts : consts + carried], given[consts + carried :]
        if not all(isinstance(x, Known) for x in stacked):
            raise self.unknown(eqn, "a 'scan' over what depends on the images")
        turns = range(params["length"])
        outputs: list[list[Value]] = []
        for turn in reversed(turns) if params["reverse"] else turns:
            layer = [_layer(x, turn) for x in stacked]
            results = self.inside(params["jaxpr"], [*given[:consts], *carry, *layer])
            carry = results[:carried]
            outputs.append(results[carried:])
        if params["reverse"]:
            outputs.reverse()
        return [*carry, *(self.stack(eqn, each) for each in zip(*outputs, strict=True))]

    def stack(self, eqn: jex.JaxprEqn, turns: tuple[Value, ...]) -> Value:
        """What all turns of a scan gave."""
        arrays = [x.array for x in turns if isinstance(x, Known)]
        if len(arrays) < len(turns):
            raise self.unknown(eqn, "a 'scan' that keeps activations")
        return Known(np.stack(arrays))


def _layer(stacked: Any, turn: int) -> Known:
    """One layer of what is stacked, with its number in the path."""
    module, slash, leaf = stacked.path.rpartition("/")
    path = f"{module}.{turn}{slash}{leaf}" if stacked.path else ""
    return Known(stacked.array[turn], path, stacked.source)


def _computed(eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """What JAX computes."""
    results = eqn.primitive.bind(*values, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]
