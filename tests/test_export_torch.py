"""Exports for PyTorch, run there: state_dicts, safetensors, and 2:4."""

import importlib
import io
import json
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import shipped
import torch
import torchvision
from rich.console import Console
from torch.sparse import _semi_structured_conversions as conversions

import base_config
import export
import st3jax
from errors import UserError
from models import MODELS
from models.resnet import IMAGENET_STAGES
from shipping import (
    agreement,
    safetensors_file,
    torch_file,
    torch_names,
    torch_networks,
    two_four,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BENCHMARKS = pathlib.Path(base_config.__file__).parent / "benchmarks"
NETWORKS = {
    "cifar_resnet": {"depth": 14, "width": 4},
    "strided": {"depth": 8, "width": 4, "stem_stride": 2},
    "imagenet_resnet": {"depth": 18, "width": 4, "size": 33},
    "bottleneck": {"depth": 50, "width": 4, "size": 33},
    "mobilenet_v1": {"multiplier": 0.125, "size": 33},
    "vgg": {"depth": 11, "size": 9},
    "wide_resnet": {"depth": 16, "widen": 1},
}
OTHERS = {"strided": "cifar_resnet", "bottleneck": "imagenet_resnet"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_in_pytorch_what_it_computes_in_jax(name, tmp_path):
    network = shipped.of_model(OTHERS.get(name, name), **NETWORKS[name])
    exported = torch_file.export(network, tmp_path)
    names = ["model.pt", "torch_networks.py"]
    assert exported.paths == [tmp_path / x for x in names] == sorted(tmp_path.iterdir())
    assert exported.error <= 1e-5
    leaves = jax.tree.leaves(network.variables)
    assert exported.zeros == sum(int(np.sum(leaf == 0)) for leaf in leaves) > 500


def test_the_transformer_computes_the_same_and_its_layers_are_numbered(tmp_path):
    network = shipped.of_transformer()
    assert torch_file.export(network, tmp_path).error <= 1e-5
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    query = network.variables["blocks"]["attention"]["query"]
    for layer in range(2):
        name = f"blocks.{layer}.attention.query"
        kernel = query["kernel"][layer].reshape(32, 32)
        np.testing.assert_array_equal(weights[f"{name}.weight"].numpy(), kernel.T)
        bias = query["bias"][layer].ravel()
        np.testing.assert_array_equal(weights[f"{name}.bias"].numpy(), bias)
    assert weights["blocks.1.norm2.weight"].shape == (32,)
    assert weights["patches.weight"].shape == (32, 1, 4, 4)


def test_torchvision_computes_the_same_with_the_tensors_of_a_resnet_18(tmp_path):
    network = shipped.of_model("imagenet_resnet", size=32, depth=18)
    assert torch_file.export(network, tmp_path).error <= 1e-5
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(weights, strict=True)
    images = torch.tensor(network.images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = model.eval()(images).numpy()
    agreement.check_logits("it", logits, agreement.expected_logits(network))


@pytest.mark.parametrize("name", ["transformer", "strided", "imagenet_resnet"])
def test_the_lines_that_are_printed_compute_the_logits(name, tmp_path, monkeypatch):
    if name == "transformer":
        network = shipped.of_transformer()
    elif name == "strided":
        network = shipped.of_model(OTHERS[name], **NETWORKS[name])
    else:
        network = shipped.of_model(name, size=32, depth=18)
    exported = torch_file.export(network, tmp_path)
    np.save(tmp_path / "images.npy", network.images)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "torch_networks", raising=False)
    found = {}
    exec(export.lines("torch", exported, tmp_path / "images.npy"), found)
    expected = agreement.expected_logits(network)
    agreement.check_logits("it", found["logits"], expected)
    if name != "imagenet_resnet":
        assert found["NETWORKS"] is not torch_networks.NETWORKS
        copied = sys.modules.pop("torch_networks").__file__
        assert pathlib.Path(copied) == exported.paths[1]


def test_of_a_network_of_ones_own_the_lines_load_weights(tmp_path):
    params = {"fc": {"kernel": np.ones((8, 3), "f")}}
    network = shipped.of_function(lambda p, x: x @ p["fc"]["kernel"], params, (8,))
    exported = torch_file.export(network, tmp_path)
    np.save(tmp_path / "images.npy", network.images)
    found = {}
    exec(export.lines("torch", exported, tmp_path / "images.npy"), found)
    assert [*found["weights"]] == ["fc.weight"]
    assert exported.paths == [tmp_path / "model.pt"]


@pytest.mark.parametrize("depth", IMAGENET_STAGES)
def test_names_and_shapes_are_those_of_torchvision(depth, monkeypatch):
    model = MODELS["imagenet_resnet"](depth=depth, num_classes=7)
    images = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.asarray(images), train=False)
    )
    variables = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), shapes)
    kernels = {
        f"params/{name}/kernel": "io" if name == "head" else "wwio"
        for name, module in variables["params"].items()
        if "kernel" in module
    }
    monkeypatch.setattr(st3jax, "layouts", lambda *of: kernels)
    monkeypatch.setattr(np, "ascontiguousarray", lambda x: x)  # or all is copied
    network = shipped.of_function(None, variables, (8,), "imagenet_resnet")
    assert torch_names.torchvision_depth(network) == depth
    found = torch_names.named_tensors(network)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7)
    expected = {name: (*x.shape,) for name, x in theirs.state_dict().items()}
    assert {name: x.values.shape for name, x in found.items()} == expected


def test_a_network_of_ones_own_is_compared_to_the_bit(tmp_path):
    def apply(params, images):
        hidden = jnp.einsum("bi,eio->beo", images, params["experts"]["kernel"])
        hidden = hidden + params["experts"]["bias"]
        return jnp.einsum("beo,eok->bk", hidden, params["mixer"])

    rng = np.random.default_rng(0)
    params = {
        "experts": {"kernel": rng.random((3, 8, 6)), "bias": rng.random((3, 6))},
        "mixer": rng.random((3, 6, 2)),
        "step": np.int32(7),
    }
    params = jax.tree.map(
        lambda x: x if x.dtype == np.int32 else x.astype(np.float32), params
    )
    layouts = st3jax.layouts(apply, params, np.zeros((2, 8), "f"))
    assert layouts["mixer"] == "iio"
    network = shipped.of_function(apply, params, (8,))
    exported = torch_file.export(network, tmp_path)
    assert exported.error is None
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {name: (*x.shape,) for name, x in weights.items()} == {
        "experts.weight": (18, 8),
        "experts.bias": (18,),
        "mixer": (2, 18),
        "step": (),
    }


def test_half_precision_and_stacks_within_stacks_come_back(tmp_path):
    def apply(params, images):
        kernel = params["blocks"]["kernel"].reshape(4, 8, 8)

        def step(x, kernel):
            return x @ kernel, None

        x, _ = jax.lax.scan(step, images.astype(kernel.dtype), kernel)
        return x.astype(jnp.float32)

    kernel = jnp.arange(256.0).reshape(2, 2, 8, 8).astype(jnp.bfloat16)
    params = {"blocks": {"kernel": np.asarray(kernel)}}
    network = shipped.of_function(apply, params, (8,))
    torch_file.export(network, tmp_path)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert [*weights] == [f"blocks.{i}.{j}.weight" for i in (0, 1) for j in (0, 1)]
    found = weights["blocks.1.0.weight"]
    assert found.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.float().numpy(), kernel[1, 0].T.astype("f"))
    safetensors_file.export(network, tmp_path)


@hypothesis.given(
    letters=st.text("oiws", min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_every_layout_has_a_way_back(letters, seed):
    shape = np.random.default_rng(seed).integers(1, 4, len(letters))
    values = np.arange(np.prod(shape)).reshape(shape)
    moved = torch_names._to_torch(values, letters)
    tensor = torch_names.Tensor(moved, ("a",), (), values.shape, letters)
    assert moved.flags.c_contiguous
    np.testing.assert_array_equal(torch_names.variables_of({"a": tensor})["a"], values)


def wrong_window(letters):
    """Axes in PyTorch's order, but that the window is turned."""
    axes = [axis for x in "soi" for axis, own in enumerate(letters) if own == x]
    return axes + [axis for axis, own in enumerate(letters) if own == "w"][::-1]


@pytest.mark.parametrize(
    ("place", "change", "sentence"),
    [
        ((torch_names, "_axes"), wrong_window, "PyTorch gives other logits than JAX"),
        (
            (torch_networks, "norm"),
            lambda weights, name, x: x,
            "PyTorch gives other logits than JAX",
        ),
        (
            (torch, "load"),
            lambda *of, **options: damaged(load(*of, **options)),
            "model.pt has other numbers in params/stem/kernel .* 53 zeros for 54",
        ),
    ],
    ids=["layout", "network", "file"],
)
def test_what_is_not_the_network_is_not_written(
    place, change, sentence, tmp_path, monkeypatch
):
    network = shipped.of_model("cifar_resnet", depth=8, width=4)
    monkeypatch.setattr(*place, change)
    with pytest.raises(UserError, match=sentence):
        torch_file.export(network, tmp_path)
    assert [*tmp_path.iterdir()] == []


load = torch.load


def damaged(weights):
    """With one zero less."""
    kernel = weights["stem.weight"].view(-1)
    kernel[int((kernel == 0).nonzero()[0])] = 1.0
    return weights


def test_two_leaves_of_one_name_are_told():
    params = {"fc": {"kernel": np.ones((8, 3), "f"), "scale": np.ones(3, "f")}}

    def apply(params, images):
        return images @ params["fc"]["kernel"] * params["fc"]["scale"]

    network = shipped.of_function(apply, params, (8,))
    with pytest.raises(UserError, match=r"fc/kernel and fc/scale .* fc.weight"):
        torch_names.named_tensors(network)


def test_a_kernel_that_takes_part_in_nothing_is_told():
    params = {"own": {"kernel": np.ones((8, 8, 3), "f")}}
    network = shipped.of_function(lambda params, images: images, params, (8,))
    with pytest.raises(UserError, match=r"layout: 'own/kernel' .* in no product"):
        torch_names.named_tensors(network)


def test_torchvision_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="pip install torchvision"):
        torch_file._torchvision(18, {})


def test_safetensors_have_the_same_names_and_bits_and_need_no_pytorch(
    tmp_path, monkeypatch
):
    network = shipped.of_model("cifar_resnet", depth=8, width=4)
    torch_file.export(network, tmp_path)
    theirs = torch.load(tmp_path / "model.pt", weights_only=True)
    for name in ("torch", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    exported = importlib.reload(safetensors_file).export(network, tmp_path)
    assert exported.paths == [tmp_path / "model.safetensors"]
    with safetensors.safe_open(exported.paths[0], "np") as file:
        metadata = file.metadata()
    read = safetensors.numpy.load_file(exported.paths[0])
    told = json.loads(metadata["st3jax"])
    assert told["network"] == "cifar_resnet"
    assert told["config"]["model"]["depth"] == 8
    assert {*read} == {*theirs}
    for name, array in read.items():
        assert array.tobytes() == theirs[name].numpy().tobytes(), name


# 2:4.


def two_four_network():
    """The transformer, of which every kernel but the patches' is 2:4."""
    network = shipped.of_transformer()
    layout = st3jax.layouts(network.apply, network.variables, network.images)

    @jax.jit
    def pruned(params):
        return st3jax.prune(
            params,
            0.5,
            pattern="2:4",
            layout=layout,
            prunable=lambda path, leaf: "kernel" in path and "patches" not in path,
        )

    sparse = pruned(network.variables)
    return network._replace(variables=jax.tree.map(np.asarray, sparse))


def test_the_kernels_of_a_2_4_network_are_2_4_in_pytorch_and_convert():
    tensors = torch_names.named_tensors(two_four_network())
    found = {kernel.name: kernel for kernel in two_four.kernels(tensors)}
    assert found.pop("patches.weight").problem == "convolution"
    assert found.pop("head.weight").problem == "its sides"
    assert len(found) == 12
    assert all(kernel.taken["cuSPARSELt"] for kernel in found.values())
    assert found["blocks.0.up.weight"].taken == {
        "CUTLASS": [],
        "cuSPARSELt": ["half", "int8"],
    }
    down = found["blocks.1.down.weight"]
    assert down.taken == {
        "CUTLASS": ["half", "int8"],
        "cuSPARSELt": ["half", "int8"],
    }
    for name in found:
        weight = torch.from_numpy(tensors[name].values.copy()).half()
        assert (weight.reshape(-1, 4) != 0).sum(1).max() == 2
        if not found[name].taken["CUTLASS"]:
            continue
        packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.shape == (len(weight), weight.shape[1] // 2)
        again = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
        assert torch.equal(again, weight)


@pytest.mark.parametrize(
    ("shape", "letters", "problem"),
    [
        ((64, 64), "oi", "256 of 1,024 fours"),
        ((64, 62), "oi", "its inputs"),
        ((64, 64, 3, 3), "oiww", "convolution"),
        ((24, 64), "oi", "its sides"),
    ],
)
def test_why_a_kernel_is_not_taken(shape, letters, problem):
    values = np.zeros(shape, np.float32)
    if "fours" in problem:
        values[:16] = [0, 1, 1, 1] * 16
    tensor = torch_names.Tensor(values, ("fc",), (), shape, letters)
    (kernel,) = two_four.kernels({"fc": tensor, "bias": tensor._replace(letters="o")})
    assert kernel.problem == problem
    assert not any(kernel.taken.values())


def test_the_table_fits_a_terminal():
    out = io.StringIO()
    two_four.print_table(Console(file=out, width=80), two_four_network())
    text = out.getvalue()
    assert "2:4 in PyTorch: 12 of 14 kernels" in text
    assert re.search(r"blocks.1.down +│ 32x128 +│ half, int8 │ half, int8 │ +│", text)
    assert re.search(r"head +│ 10x512 +│ +│ +│ its sides +│", text)


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark of 2:4, with one small layer."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import two_four as module

    case = module.Case("small", 64, 128, 21, is_mlp=True)
    monkeypatch.setattr(module, "CASES", [case, case._replace(name="ViT-L MLP")])
    monkeypatch.setattr(module, "in_turn", lambda runs, device: [2e-3, 1e-3])
    return module


def multiplied(weight, x, transpose_result, alg_id):
    """What PyTorch does on a GPU."""
    assert alg_id == 7
    assert not x.shape[1] % 8
    y = weight @ x
    return y.t() if transpose_result else y


def test_the_benchmark_times_what_runs_and_tells_what_fails(benchmark, monkeypatch):
    rows = [*benchmark.rows("CUTLASS", "cpu", end=float("inf"))]
    assert len(rows) == 6
    assert all("Only CUDA tensors are currently supported" in row for row in rows)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *of, **options: 7)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiplied)
    rows = [*benchmark.rows("cuSPARSELt", "cpu", end=float("inf"))]
    for row, library in zip(rows[1:3], benchmark.VARIANTS, strict=True):
        head = f"| small | 64 x 128 | 21 | bfloat16 | {library} | from Python |"
        assert row == f"{head} 2000.0 | 1000.0 | 2.00 | 0.0e+00 |"
    assert len(rows) == 18
    assert "out of time" in next(benchmark.rows("CUTLASS", "cpu", end=0.0))


def test_the_weights_of_the_benchmark_are_2_4(benchmark):
    weight = benchmark.two_four(torch.ones(64, 128))
    assert {*(weight.reshape(-1, 4) != 0).sum(1).tolist()} == {2}
    assert (weight != 0).any(0).all()


def test_the_benchmark_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "two_four.py"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: no NVIDIA GPU")
