"""The benchmark of inference: what it prunes, what engines compute, what it says."""

import importlib.util
import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import onnx
import pytest
from flagless import imported

import base_config
from shipping.network import Network
from shipping.onnx_writer import to_onnx

BENCHMARKS = pathlib.Path(base_config.__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the folder is no package
inference = imported("inference")
engines = imported("engines")
networks = imported("inference_networks")
tables = imported("inference_tables")


class Tiny(nn.Module):
    """Kernels of 144, 512 and 320 weights, at 64, 4 and 1 places of an image."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (1, 1), strides=4, use_bias=False)(x))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def network(quickly_compiled):
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    variables = jax.device_get(Tiny().init(jax.random.key(0), images))
    return Network("tiny", Tiny().apply, variables, images, {})


def zeros(network):
    """How many weights of each kernel are zero."""
    layers = network.variables["params"].values()
    return [int((layer["kernel"] == 0).sum()) for layer in layers]


def test_distributions_differ_in_where_zeros_are(network):
    found = {
        name: zeros(networks.pruned(network, 0.75, name))
        for name in networks.DISTRIBUTIONS
    }
    assert len({tuple(counts) for counts in found.values()}) == len(found)
    assert sum(found["global"]) == sum(found["l1_sigma"]) == int(0.75 * 975) + 1
    assert found["uniform"] == [int(0.75 * (n - 1)) + 1 for n in (144, 512, 320)]
    costs = np.array([64, 4, 1]) * found["costs"]
    assert costs.sum() == pytest.approx(0.75 * (64 * 144 + 4 * 512 + 320), abs=64)


def test_all_engines_compute_the_same(network, tmp_path):
    """Each at other sizes of a batch than the export was made with."""
    path, images = tmp_path / "tiny.onnx", np.repeat(network.images, 3, 0)
    onnx.save(to_onnx(networks.pruned(network, 0.9, "uniform")), path)
    engines.convert_for_mnn(path, path.with_suffix(".mnn"))
    files = {"MNN": path.with_suffix(".mnn")}
    expected = None
    for name, engine in engines.ENGINES.items():
        if name == "OpenVINO" and not importlib.util.find_spec("openvino"):
            continue  # it comes with the extra "benchmarks" alone
        found = engine(files.get(name, path), images, 1)(images)
        assert found.shape == (6, 10)
        expected = found if expected is None else expected
        inference.check(name, found, expected)
    with pytest.raises(RuntimeError, match=r"MNN are .* off"):
        inference.check("MNN", 1.1 * found, expected)


def row(engine, sparsity, ms):
    return {
        **{"engine": engine, "sparsity": sparsity, "file_mb": 1, "processor": "some"},
        **{"cpu_ms": ms, "cpu_ms_median": ms, "wall_ms": ms, "wall_ms_median": ms},
    }


def test_ratios_are_those_to_the_same_engine_and_to_the_best():
    group = tables.Group("ResNet-50", "global", batch=1, threads=1)
    dense = [row("ONNX Runtime", 0.0, 40.0), row("MNN", 0.0, 60.0)]
    rows = [*dense, row("MNN", 0.8, 50.0), row("MNN", 0.9, 20.0)]
    lines = tables.table(group, rows).splitlines()
    assert "| MNN | 90 % | 1 | 20.00 | 20.00 | 3.00 | 2.00 |" in lines
    assert "| MNN | dense | 1 | 60.00 | 60.00 | 1.00 | 0.67 |" in lines
    assert lines[-1].startswith("ResNet-50 is 2.00 times as fast as dense in ONNX")
    assert "90 % is the least that pays" in lines[-1]
    rows = [*dense, row("MNN", 0.8, 50.0), row("MNN", 0.98, "nan")]
    lines = tables.table(group, rows).splitlines()
    assert lines[-3] == "| MNN | 98 % | whole layers without weights | | | | |"
    assert lines[-1].startswith("Zeros make ResNet-50 no faster here than ONNX Runtime")
    assert tables.overview({group: rows}).splitlines()[-1] == (
        "| ResNet-50, global, batch 1 | ONNX Runtime 40.0 | 50.0, **0.80** | none |"
    )
