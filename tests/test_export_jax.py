"""Exports for JAX: a program and its weights, which run without this project."""

import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shipped
import zstandard
from jax import export as jax_export

from errors import UserError
from shipping import agreement, jax_program

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ALONE = """
import sys
sys.modules.update(st3jax=None, flax=None, shipping=None)
import numpy as np
from run import logits
images = np.load("images.npy")
np.save("logits.npy", logits(images))
np.save("first.npy", logits(images[:1]))
"""


@pytest.fixture(scope="module")
def network():
    return shipped.of_model("cifar_resnet", depth=8, width=4)


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return jax_program.export(network, folder)


def test_what_was_written_runs_without_this_project(network, exported):
    folder = exported.paths[0].parent
    np.save(folder / "images.npy", network.images)
    run = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True
    )
    assert not run.returncode, run.stderr
    found, first = (np.load(folder / f"{name}.npy") for name in ("logits", "first"))
    expected = agreement.expected_logits(network)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(first, expected[:1], 1e-4, 1e-5)


def test_the_command_prints_the_class_and_all_logits(network, exported, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, exported.paths[0], *arguments],
            capture_output=True,
            text=True,
        )

    expected = agreement.expected_logits(network)
    np.save(tmp_path / "images.npy", network.images)
    rows = np.array(run(tmp_path / "images.npy").stdout.split(), float)
    rows = rows.reshape(len(network.images), -1)
    np.testing.assert_array_equal(rows[:, 0], expected.argmax(1))
    np.testing.assert_allclose(rows[:, 1:], expected, 1e-4, 1e-5)
    assert run().stderr == "usage: python run.py images.npy\n"
    gone = run("gone.npy")
    assert gone.returncode == 1
    assert re.fullmatch(r"error: .*No such file .*'gone.npy'\n", gone.stderr)
    np.save(tmp_path / "images.npy", network.images[:, :3])
    wrong = run(tmp_path / "images.npy").stderr
    assert re.fullmatch(r"error: Shape mismatch .*\n", wrong)


def test_it_says_what_was_found(network, exported):
    leaves = jax.tree.leaves(network.variables)
    assert exported.zeros == sum(int(np.sum(leaf == 0)) for leaf in leaves) > 500
    assert exported.error <= 1e-5
    assert jax.__version__ in exported.notes[0]
    assert [path.name for path in exported.paths] == [*jax_program.FILES]
    assert sorted(exported.paths[0].parent.glob(".*")) == []


def test_a_program_is_for_all_platforms_and_says_nothing_of_this_machine(exported):
    program = zstandard.decompress(exported.paths[1].read_bytes())
    loaded = jax_export.deserialize(bytearray(program))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    assert "batch" in str(loaded.in_avals[-1].shape)
    assert len(exported.paths[1].read_bytes()) < 20_000
    for place in (jax_program.__file__, nn.__file__, __file__):
        assert str(pathlib.Path(place).parent).encode() not in program
    assert jax.config.values[jax_program.SOURCES] != 0


def test_products_are_computed_in_full_float32(network):
    loaded = jax_export.deserialize(bytearray(jax_program.program(network)))
    assert re.search(r"convolution.*HIGHEST", loaded.mlir_module())


def test_the_reader_is_short_and_the_one_of_the_documentation():
    code = jax_program.reader().partition("\n\n")[2]
    assert code in (jax_program.DOCS / "files.md").read_text()
    assert len(code.splitlines()) <= 40
    assert jax_program.RUN.read_text().count("\n") <= 36


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("program", r"the program gives other logits .* by 1.0e-0\d of the largest"),
        ("weights", r"model.st3 has other numbers in params/head/kernel than JAX"),
    ],
)
def test_what_is_not_the_network_is_not_written(
    network, tmp_path, monkeypatch, change, sentence
):
    if change == "program":
        other = network._replace(apply=lambda *of: 1.0001 * network.apply(*of))
        program = jax_program.program(other)
        monkeypatch.setattr(jax_program, "program", lambda network: program)
    else:
        load = jax_program.st3jax.load_sparse

        def damaged(path, **options):
            tree = load(path, **options)
            tree["params"]["head"]["kernel"][0, 0] += 1
            return tree

        monkeypatch.setattr(jax_program.st3jax, "load_sparse", damaged)
    (tmp_path / "model.st3").write_text("before")
    with pytest.raises(UserError, match=sentence):
        jax_program.export(network, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.st3"]
    assert (tmp_path / "model.st3").read_text() == "before"


def test_a_network_for_one_batch_size_is_told(tmp_path):
    def apply(params, images):
        return images.reshape(len(images), -1) @ params["kernel"]

    network = shipped.of_function(apply, {"kernel": np.ones((8, 3), "f")}, (8,))
    with pytest.raises(UserError, match=r"a batch of any size: .*x.shape\[0\] for len"):
        jax_program.export(network, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_stacked_layers_and_half_precision_come_through(tmp_path):
    network = shipped.of_transformer()
    assert jax_program.export(network, tmp_path).error <= 1e-5

    def apply(params, images):
        return (images.astype(jnp.bfloat16) @ params["kernel"]).astype(jnp.float32)

    kernel = np.asarray(jnp.eye(8, 3, dtype=jnp.bfloat16))
    half = shipped.of_function(apply, {"kernel": kernel}, (8,))
    assert jax_program.export(half, tmp_path).zeros == 21


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({}, "nothing of a/kernel"),
        ({"a": {"kernel": np.zeros((2, 1), "f")}}, r"float32\[2, 1\].*float32\[2\]"),
        ({"a": {"kernel": np.zeros(2, np.float16)}}, "float16"),
        ({"a": {"kernel": np.array([0.0, -0.0], "f")}}, "2 zeros for 2"),
    ],
)
def test_where_weights_differ_is_told(found, sentence):
    own = {"a": {"kernel": np.zeros(2, np.float32)}}
    network = shipped.of_function(None, own, (1,))
    with pytest.raises(UserError, match=sentence):
        agreement.check_variables("it", found, network)


def test_logits_that_are_no_numbers_are_told():
    expected = np.ones((2, 3), np.float32)
    assert agreement.check_logits("it", 0 * expected, 0 * expected) == 0
    assert agreement.check_logits("it", expected * np.float32(1 + 5e-6), expected) > 0
    with pytest.raises(UserError, match="differ by nan"):
        agreement.check_logits("it", expected * np.nan, expected)
    with pytest.raises(UserError, match="shape"):
        agreement.check_logits("it", expected[:1], expected)
