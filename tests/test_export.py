"""What a run left, in formats that others run: the same network, or a sentence."""

import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import onnx
import pytest
from shipped import drawn, of_model, of_transformer
from training import tiny

import export
import st3jax
from errors import UserError
from job.build import build
from shipping import agreement, mnn_file, onnx_file, onnx_products
from shipping.network import read_network
from workdir import ship
from workdir.claim import claim_workdir

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder as a run on digits leaves it, with a network of random weights."""
    folder = tmp_path_factory.mktemp("run")
    job = build(tiny(**{"model.dtype": "bfloat16", "model.width": 8}))
    claim_workdir(folder, job.config)
    images = np.zeros((1, 8, 8, 1))
    shapes = jax.eval_shape(
        lambda: job.model.init(jax.random.key(0), images, train=False)
    )
    networks = {"test": jax.tree.map_with_path(drawn(np.random.default_rng(0)), shapes)}
    ship.write_networks(folder, job, networks, {"test_accuracy": 0.1})
    return folder


@pytest.fixture
def transformer_out(tmp_path):
    shape = {"size": 8, "patch": 2, "width": 32, "layers": 2, "heads": 2, "seed": 0}
    about = {"network": "transformer", "dataset": "digits", "model": shape}
    variables = of_transformer().variables
    st3jax.save_sparse(tmp_path / "model.st3", variables, metadata=about)
    return tmp_path


def test_a_run_is_read_with_its_images(workdir):
    network = read_network(workdir)
    job = build(tiny(**{"model.width": 8}))
    example = job.data.test[2]["image"].astype(np.float32)
    mean, std = job.config.data.mean[0], job.config.data.std[0]
    np.testing.assert_allclose(
        network.images[2], (example / 255 - mean) / std, atol=1e-6
    )
    assert network.images.shape == (16, 8, 8, 1)
    logits = network.apply(network.variables, network.images)
    assert logits.dtype == np.float32
    exact = jax.config.jax_default_matmul_precision
    assert exact is None  # as it was
    expected = job.model.apply(network.variables, network.images, train=False)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (lambda v, x: x.mean((1, 2)) / 0, "itself gives numbers that are not finite"),
        (lambda v, x: (x, x), "gives a tuple, and an export has one array"),
    ],
)
def test_a_network_that_is_none_is_told(workdir, apply, words):
    network = read_network(workdir)._replace(apply=apply)
    with pytest.raises(UserError, match=words):
        agreement.expected_logits(network)


def test_a_network_without_kernels_has_nothing_to_leave_out(workdir):
    network = read_network(workdir)._replace(apply=lambda v, x: x.mean((1, 2)))
    agreed = onnx_file.agreed_model(network._replace(variables={}), compacted=True)
    assert agreed.notes == ("nothing could be left out: no channel does nothing",)


def test_every_format_of_a_run(workdir, tmp_path, capsys):
    written = export.export(workdir, ["onnx", "mnn"], tmp_path)
    said = capsys.readouterr().out
    for name, result in written.items():
        assert result.error <= 1e-5
        assert result.paths == [tmp_path / f"model.{name}"]
        assert str(result.paths[0]) in said
        assert f"{result.paths[0].stat().st_size:,}" in said
    assert sorted(os.listdir(tmp_path)) == ["images.npy", "model.mnn", "model.onnx"]
    assert re.search(r"test images +│ images.npy +│ +4,224 ", said)
    assert "/ 0.376 of pixels from 0 to 255\n" in said
    zeros = int(st3jax.summary(read_network(workdir).variables["params"]).zeros)
    assert [result.zeros for result in written.values()] == [zeros] * 2


def test_the_lines_that_are_printed_run_the_files(workdir, tmp_path, capsys):
    folder = tmp_path / "it's here"
    export.export(workdir, ["onnx", "mnn", "jax"], folder)
    said = capsys.readouterr().out
    network = read_network(workdir)
    images = np.load(folder / "images.npy")
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, network.images)
    expected = network.apply(network.variables, network.images)
    for name in ("onnx", "mnn"):
        found = {}
        exec(
            re.search(rf"\n{name}:\n(import.*?logits.*?)\n\n\w+:", said, re.S)[1], found
        )
        np.testing.assert_allclose(found["logits"], expected, rtol=1e-4, atol=1e-5)
    run = shlex.split(said.partition("\njax:\n")[2])
    assert run == ["python", *(str(folder / x) for x in ("run.py", "images.npy"))]


def test_the_transformer(transformer_out):
    written = export.export(transformer_out, ["mnn"])
    assert written["mnn"].error <= 1e-5
    assert sorted(os.listdir(transformer_out / "export")) == ["images.npy", "model.mnn"]


def test_a_compact_network_is_smaller_and_the_same(workdir, tmp_path):
    path = workdir / "model.st3"
    before = path.read_bytes()
    tree, header = st3jax.load_sparse(path), st3jax.read_header(path)
    tree["params"]["stage1_block1_conv1"]["kernel"][..., :4] = 0.0
    tree["params"]["stage1_block1_norm1"]["bias"][:4] = -1.0
    tree["batch_stats"]["stage1_block1_norm1"]["mean"][:4] = 0.0
    st3jax.save_sparse(path, tree, metadata=header["metadata"])
    try:
        small = export.export(workdir, ["onnx", "mnn"], tmp_path, compacted=True)
        large = export.export(workdir, ["onnx"], tmp_path)
    finally:
        path.write_bytes(before)
    names = ["images.npy", "model.onnx", "model_compact.mnn", "model_compact.onnx"]
    assert sorted(os.listdir(tmp_path)) == names
    sizes = [x["onnx"].paths[0].stat().st_size for x in (small, large)]
    assert sizes[0] < sizes[1]
    assert "of the multiply-adds" in small["onnx"].notes[0]


def test_that_nothing_could_be_left_out_is_told():
    agreed = onnx_file.agreed_model(of_transformer(), compacted=True)
    assert agreed.notes == ("nothing could be left out: no channel does nothing",)


def test_mnn_tells_of_kernels_that_it_runs_dense():
    kernels = [
        onnx_file.Kernel("stem/kernel", 10, 6, 300),
        onnx_file.Kernel("head/kernel", 10, 7, 100),
    ]
    (sentence,) = mnn_file.dense_kernels(kernels)
    assert "1 of 2 kernels dense" in sentence
    assert "(stem): they have 75% of all" in sentence
    assert mnn_file.dense_kernels(kernels[1:]) == ()


def test_multiply_adds_are_those_of_the_trace():
    network = of_model("mobilenet_v1", 33, multiplier=0.125)
    costs = st3jax.multiply_adds(
        lambda params, images: network.apply(
            {**network.variables, "params": params}, images
        ),
        network.variables["params"],
        network.images[:1],
    )
    model = onnx_file.agreed_model(network, compacted=False).model
    found = {x.name: x.multiply_adds / x.weights for x in onnx_file.kernels_of(model)}
    assert found == {path: int(cost) for path, cost in costs.items()}


def without_pads(padding):
    return [0] * 2 * len(padding)


def test_a_wrong_model_is_not_written_and_its_first_difference_told(
    tmp_path, monkeypatch
):
    network = of_model("imagenet_resnet", 33, depth=18, width=4)
    right = onnx_products.max_pool

    def wrong(graph, eqn, x):
        with monkeypatch.context() as patch:
            patch.setattr(onnx_products, "_pads", without_pads)
            return right(graph, eqn, x)

    primitives = importlib.import_module("shipping.onnx_primitives").PRIMITIVES
    monkeypatch.setitem(primitives, "reduce_window_max", wrong)
    for module in (onnx_file, mnn_file):
        with pytest.raises(UserError, match=r"stem_norm/maxpool.*reduce_window_max"):
            module.export(network, tmp_path)
    assert os.listdir(tmp_path) == []


def test_wrong_numbers_are_found_where_they_arise(tmp_path, monkeypatch):
    primitives = importlib.import_module("shipping.onnx_primitives").PRIMITIVES

    def wrong(graph, eqn, x):
        return graph.compute("Sigmoid", [x.name], x.shape, x.order)

    monkeypatch.setitem(primitives, "tanh", wrong)
    with pytest.raises(UserError, match=r"at blocks/up\.0/sigmoid.*'tanh'"):
        onnx_file.export(of_transformer(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_other_zeros_are_refused(tmp_path, monkeypatch):
    network = of_model("cifar_resnet", depth=8, width=8)
    right = onnx_file.write

    def wrong(network):
        written = right(network)
        for constant in written.model.graph.initializer:
            if constant.name == "head/kernel":
                array = onnx.numpy_helper.to_array(constant) + np.float32(1e-20)
                constant.CopyFrom(onnx.numpy_helper.from_array(array, constant.name))
        return written

    monkeypatch.setattr(onnx_file, "write", wrong)
    with pytest.raises(UserError, match="0 zeros in params/head/kernel, which has"):
        onnx_file.export(network, tmp_path)
    assert os.listdir(tmp_path) == []


def test_mnn_that_fails_is_told(tmp_path, monkeypatch):
    network = of_model("cifar_resnet", depth=8, width=8)
    broken = onnx.ModelProto()
    monkeypatch.setattr(
        mnn_file,
        "agreed_model",
        lambda *_: onnx_file.Agreed(broken, 0, 0.0, ()),
    )
    with pytest.raises(UserError, match=r"MNN.*nothing was written"):
        mnn_file.export(network, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nowhere", {"formats": ["onnx"]}, "there is no folder .*nowhere"),
        (".", {"formats": ["onnx"]}, "there is no run in "),
        ("started", {"formats": ["onnx"]}, "started has not ended"),
        ("broken", {"formats": ["onnx"]}, "model.st3 cannot be loaded"),
        (".", {"formats": ["tflite"]}, "got 'tflite'"),
        (".", {"formats": []}, "--format is some of jax, .*, got none"),
        (
            ".",
            {"formats": ["onnx"], "data_dir": "no/where"},
            "no folder no/where: --da",
        ),
    ],
)
def test_what_is_wrong_is_a_sentence(name, options, words, tmp_path):
    for folder in ("started", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "started" / "config.json").write_text("{}")
    (tmp_path / "broken" / "model.st3").write_bytes(b"no network")
    with pytest.raises(UserError, match=words):
        export.export(tmp_path / name, **options)


def command(*arguments):
    program = pathlib.Path(export.__file__)
    return subprocess.run(
        [sys.executable, program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes(transformer_out, tmp_path):
    out = tmp_path / "elsewhere"
    done = command(f"--workdir={transformer_out}", "--format=onnx", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(out)) == ["images.npy", "model.onnx"]


def test_the_command_tells_what_is_missing():
    done = command("--workdir=.")
    assert done.returncode == 1
    assert done.stderr.startswith("error: flag --format")
    assert done.stderr.count("\n") == 1


CRASH = """
import export
from absl import app
def fails(*_):
    raise ZeroDivisionError("of somebody")
export.export = fails
export.define_flags()
app.run(export.main, flags_parser=export.parse_flags)
"""


def test_an_error_that_nobody_foresaw_is_a_sentence(tmp_path):
    arguments = [f"--workdir={tmp_path}", "--format=onnx"]
    done = subprocess.run(
        [sys.executable, "-c", CRASH, *arguments],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(export.__file__).parent,
    )
    (file,) = tmp_path.glob("crash-*.txt")
    assert done.returncode == 1
    assert done.stderr == (
        "error: unexpected ZeroDivisionError: of somebody; the whole traceback is in "
        f"{file}\n"
    )


def test_images_that_are_gone_are_told(workdir, tmp_path):
    for name in ("config.json", "model.st3"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    tree, header = (
        f(tmp_path / "model.st3") for f in (st3jax.load_sparse, st3jax.read_header)
    )
    metadata = json.loads(json.dumps(header["metadata"]))
    metadata["config"]["data"]["name"] = "fashion_mnist"
    st3jax.save_sparse(tmp_path / "model.st3", tree, metadata=metadata)
    with pytest.raises(UserError, match="fashion_mnist"):
        read_network(tmp_path, data_dir=str(tmp_path / "nowhere"))


def test_what_is_not_installed_is_told(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "shipping.onnx_file", None)
    with pytest.raises(UserError, match=r"-e '\.\[export\]' installs all of them"):
        export.export(workdir, ["onnx"])


def test_mnn_that_is_not_installed_is_told_before_it_is_needed(workdir, monkeypatch):
    monkeypatch.delitem(sys.modules, "shipping.mnn_file")
    monkeypatch.setitem(sys.modules, "MNN", None)
    with pytest.raises(UserError, match=r"--format=mnn needs .* 'MNN'\): pip install"):
        export.export(workdir, ["mnn"])
