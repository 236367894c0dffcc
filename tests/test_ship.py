"""What a run leaves to ship: the network that was tested, whole, and how to use it."""

import json

import flax
import jax
import ml_collections
import numpy as np
import pytest
from safetensors import numpy as safetensors
from training import leaves, same_bits, tiny
from workdirs import folder, overrides

import base_config
import st3jax
import train
from errors import UserError
from job.build import build
from models import create_model
from workdir import ship

__all__ = ["folder", "overrides"]
pytestmark = pytest.mark.usefixtures("quickly_compiled")

FILES = ["model.st3", "model.safetensors", "model_ema.st3", "model_ema.safetensors"]
NETWORKS = {"model": "test", "model_ema": "ema_test"}


@pytest.fixture(scope="module")
def settings(overrides):
    """A short run, with moving averages."""
    fields = {"num_epochs": 1, "defaults.common.fine_tune_epochs": 0, "ema_decay": 0.9}
    return tiny(**overrides | fields | {"defaults.common.sparsity.end_epoch": 0.5})


@pytest.fixture(scope="module")
def ended(settings, tmp_path_factory):
    """The workdir of a run, its report, and what it has tested last."""
    workdir = tmp_path_factory.mktemp("ended")
    compiled, evaluated = train.compile_programs, []

    def compile_programs(*args):
        programs = compiled(*args)

        def eval_variables(state):
            evaluated.append(programs.eval_variables(state))
            return evaluated[-1]

        return programs._replace(eval_variables=eval_variables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_programs", compile_programs)
        report = train.train_and_evaluate(settings, workdir)
    return workdir, report, jax.tree.map(lambda x: np.asarray(x[0]), evaluated[0])


def test_the_file_alone_makes_the_network_that_was_tested(ended, settings):
    workdir, report, _ = ended
    images, labels = [], []
    for example in build(settings).data.test:
        images.append(example["image"])
        labels.append(example["label"])
    for name, tested in NETWORKS.items():
        variables = st3jax.load_sparse(workdir / f"{name}.st3")
        about = st3jax.read_header(workdir / f"{name}.st3")["metadata"]
        config = ml_collections.ConfigDict(about["config"])
        model = create_model(config, about["num_classes"])
        inputs = (np.array(images) / 255.0 - about["mean"]) / about["std"]
        logits = model.apply(variables, inputs.astype(np.float32), train=False)
        correct = int((logits.argmax(-1) == np.array(labels)).sum())
        assert correct / len(labels) == report[f"{tested}_accuracy"]
        assert about["test_accuracy"] == report[f"{tested}_accuracy"]
        assert about["sparsity"] == report["sparsity"]
        summary = st3jax.summary(variables["params"])
        assert int(summary.zeros) == report["weights"] - report["nonzero_weights"]


def test_the_file_has_the_bits_that_were_tested(ended):
    workdir, _, evaluated = ended
    assert evaluated.keys() == set(NETWORKS.values())
    for name, network in NETWORKS.items():
        loaded = st3jax.load_sparse(workdir / f"{name}.st3")
        assert same_bits(leaves(loaded), leaves(evaluated[network]))


def test_the_dense_file_is_the_same_in_one_line(ended):
    for name in NETWORKS:
        path = ended[0] / f"{name}.safetensors"
        flat = safetensors.load_file(path)
        assert "params.stage1_block1_conv1.kernel" in flat
        dense = flax.traverse_util.unflatten_dict(flat, sep=".")
        compact = st3jax.load_sparse(path.with_suffix(".st3"))
        assert same_bits(leaves(dense), leaves(compact))
        start = path.read_bytes()
        header = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
        about = st3jax.read_header(path.with_suffix(".st3"))["metadata"]
        assert json.loads(header["__metadata__"]["st3jax"]) == about


def test_an_ended_run_writes_the_same_bytes_again(ended, settings, capsys):
    workdir, report, _ = ended
    before = {name: (workdir / name).read_bytes() for name in FILES}
    for name in FILES:
        (workdir / name).unlink()
    capsys.readouterr()
    assert train.train_and_evaluate(settings, workdir) == report
    assert {name: (workdir / name).read_bytes() for name in FILES} == before
    said = capsys.readouterr().out
    for name, what in (("model", "the network"), ("model_ema", "the moving average")):
        compact, dense = (len(before[f"{name}.{x}"]) for x in ("st3", "safetensors"))
        assert (
            f"{what} to ship: {workdir / name}.st3, {compact:,} bytes, "
            f"{dense / compact:.1f} times smaller than dense ({name}.safetensors, "
            f"{dense:,})\n"
        ) in said


def test_a_file_says_nothing_of_the_machine(ended, overrides):
    for name in FILES:
        contents = (ended[0] / name).read_bytes()
        assert overrides["data.dir"].encode() not in contents
        assert b"broken_images" not in contents
    about = st3jax.read_header(ended[0] / "model.st3")["metadata"]
    fields = base_config.get_config().to_dict().keys() - {"defaults"}
    assert about["config"].keys() == fields
    assert about["config"]["sparsity"]["final"] == 0.6


def test_axes_are_named_as_the_model_uses_them(ended):
    for leaf in st3jax.read_header(ended[0] / "model.st3")["leaves"]:
        axes = len(leaf["shape"])
        if leaf["path"][-1] == "kernel":
            assert leaf["layout"] == {4: "wwio", 2: "io"}[axes]


@pytest.mark.parametrize("name", FILES)
def test_a_network_that_cannot_be_written_is_told(ended, settings, tmp_path, name):
    _, report, evaluated = ended
    job = build(settings)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"^writing to {tmp_path} failed .Is a directo"):
        ship.write_networks(tmp_path, job, evaluated, report)
    (tmp_path / name).rmdir()
    assert len(ship.write_networks(tmp_path, job, evaluated, report)) == 2
    for each in FILES:
        assert (tmp_path / each).read_bytes() == (ended[0] / each).read_bytes()


def test_one_process_of_many_writes(ended, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    told = ship.write_networks(tmp_path, build(settings), ended[2], ended[1])
    assert (told, list(tmp_path.iterdir())) == ([], [])
