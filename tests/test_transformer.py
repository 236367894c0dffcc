"""The transformer's one file: exact zeros, dense, on many devices, and what it says."""

import gzip
import importlib.util
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from flax import nnx

import st3jax

FILE = pathlib.Path(__file__).parent.parent / "experiments" / "transformer.py"
TINY = {
    "dataset": "digits",
    "sparsity": 0.9,
    "epochs": 5,  # of 3 steps: the ramp ends after 7, zeros are fixed after 9
    "batch_size": 32,
    "learning_rate": 2e-3,
    "seed": 0,
}

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def transformer():
    """The file, imported such that its flags are not mixed with those of others."""
    spec = importlib.util.spec_from_file_location("transformer", FILE)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(flags.FLAGS._flags(), clear=True):
        spec.loader.exec_module(module)
    (images, labels), (tests, classes) = module.load("digits")
    assert (len(labels), len(classes)) == (1438, 359)
    few = (images[:100], labels[:100]), (tests[:40], classes[:40])
    with mock.patch.object(module, "load", return_value=few):
        yield module


@pytest.fixture(scope="module")
def eight(transformer, tmp_path_factory):
    """A run on eight devices, and where its weights are."""
    out = tmp_path_factory.mktemp("eight") / "weights"
    return transformer.run(**TINY, out=str(out)), out


def params(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def test_it_ends_with_the_zeros_that_were_asked_for(eight):
    end, _ = eight
    assert end["zeros"] == int(0.9 * (end["weights"] - 1)) + 1
    zeros = [
        int((x == 0).sum())
        for path, x in jax.tree.leaves_with_path(params(end["model"]))
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert sum(zeros) == end["zeros"]
    assert len(zeros) == 8  # of all layers together: each kernel is one stack


def test_what_is_saved_is_what_finalize_made(eight):
    end, out = eight
    mine = params(end["model"])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(out, jax.tree.map(np.asarray, mine))
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(mine))


def test_the_compact_file_makes_the_network_again(transformer, eight):
    end, out = eight
    header = st3jax.read_header(out / "model.st3")
    about = header["metadata"]
    assert (about["network"], about["dataset"]) == ("transformer", "digits")
    assert about["test_accuracy"] == end["accuracy"]
    assert about["sparsity"] == end["zeros"] / end["weights"]
    layouts = {"/".join(x["path"]): x.get("layout") for x in header["leaves"]}
    assert layouts["blocks/attention/query/kernel"] == "sioo"
    again = transformer.ViT(**about["model"] | {"seed": 7})
    nnx.update(again, st3jax.load_sparse(out / "model.st3"))
    images = np.random.default_rng(0).random((4, 8, 8), np.float32)
    np.testing.assert_array_equal(again(images), end["model"](images))


def test_weights_are_whole_on_each_device(eight):
    end, _ = eight
    for leaf in jax.tree.leaves(params(end["model"])):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize("devices", [1, 2])
def test_the_number_of_devices_does_not_change_the_network(transformer, eight, devices):
    end, other = transformer.run(**TINY, devices=devices), eight[0]
    np.testing.assert_allclose(end["thresholds"], other["thresholds"], 1e-5)
    assert np.min(end["thresholds"][:2]) > 0.01
    assert end["zeros"] == other["zeros"]


def test_the_command_trains_dense_and_says_what_came_out(transformer, capsys):
    settings = TINY | {"sparsity": 0.0, "devices": 1}
    flags = [SimpleNamespace(name=name, value=x) for name, x in settings.items()]
    with mock.patch.object(transformer, "SETTINGS", flags):
        transformer.main(["transformer.py"])
    *epochs, last = capsys.readouterr().out.splitlines()
    assert len(epochs) == 5
    for line in epochs:
        each = r"epoch \d: loss \d\.\d+, mean threshold (-1|0)\.0+"
        assert re.fullmatch(each, line)
    end = r"test accuracy \d+\.\d\d %, 0 zeros of 207,872 weights, [\d,]+ images/s"
    assert re.fullmatch(end, last)


def test_a_flag_that_is_out_of_range_is_told():
    command = [sys.executable, str(FILE), "--sparsity=90"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "--sparsity=90: 90.0 is not a number in the range [0, 1]" in run.stderr


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"epochs": 1}, "3 steps are too few: more epochs or a smaller batch"),
        ({"batch_size": 60}, "--batch_size=60 does not divide by 8 devices"),
        ({"devices": 9}, "--devices=9, but there are 8"),
        ({"out": "."}, ". exists: name another folder with --out=..."),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(transformer, setting, sentence):
    with pytest.raises(SystemExit, match="^error: " + re.escape(sentence)):
        transformer.run(**TINY | setting)


def test_fashion_mnist_that_is_not_there_is_told(transformer, tmp_path):
    sentence = "^error: no .*: apt-get install dataset-fashion-mnist"
    with (
        mock.patch.object(transformer, "FASHION_MNIST", tmp_path),
        pytest.raises(SystemExit, match=sentence),
    ):
        transformer.read_idx("train")


def test_fashion_mnist_is_read_from_its_files(transformer, tmp_path):
    pixels = bytes(range(256)) * 7 * 7  # 16 images of 28x28
    images, labels = b"h" * 16 + pixels, b"h" * 8 + bytes(range(16))
    for name, data in (("images-idx3", images), ("labels-idx1", labels)):
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    with mock.patch.object(transformer, "FASHION_MNIST", tmp_path):
        read, classes = transformer.read_idx("t10k")
    assert read.shape == (16, 28, 28)
    np.testing.assert_allclose(read.ravel()[:256] * 255, np.arange(256), 1e-6)
    assert classes.tolist() == list(range(16))


def test_a_batch_has_images_with_their_labels_shifted_by_up_to_a_pixel(transformer):
    images = np.zeros((64, 8, 8), np.float32)
    images[:, 3, 4] = labels = np.arange(1, 65)
    seen = list(transformer.batches((images, labels), 32, [0, 1]))
    again = list(transformer.batches((images, labels), 32, [0, 1]))
    jax.tree.map(np.testing.assert_array_equal, seen, again)
    assert sorted(np.concatenate([part for _, part in seen])) == labels.tolist()
    places = set()
    for part, names in seen:
        np.testing.assert_array_equal(part.sum((1, 2)), names)
        places |= set(zip(*np.nonzero(part)[1:], strict=True))
    assert places == {(y, x) for y in (2, 3, 4) for x in (3, 4, 5)}


def test_an_argument_that_is_no_flag_is_told(transformer):
    with pytest.raises(SystemExit, match="unknown argument 'digits'"):
        transformer.main(["transformer.py", "digits"])
