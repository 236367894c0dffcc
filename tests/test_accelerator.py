"""The measurements for an accelerator: run small, each part writes what it found."""

import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import base_config

BENCHMARKS = pathlib.Path(base_config.__file__).parent / "benchmarks"
ROOT = BENCHMARKS.parent.parent
sys.path.insert(0, str(BENCHMARKS))

import accelerator  # noqa: E402  the folder is no package

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ABSENT = ("array_record", "grain", "ml_collections", "tensorflow_datasets")
STEPS = [name for name in accelerator.PARTS if name.startswith(("resnet", "trans"))]
PROGRAM = """
import json, sys, time
print(json.dumps({"method": "first", "ms": 1234.5678}), flush=True)
print("said by a library", flush=True)
if "--part=golden" in sys.argv:
    raise ValueError("no luck")
if "--part=selection" in sys.argv:
    time.sleep(1000)
print(json.dumps({"method": "second", "ms": None}), flush=True)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A whole run where the libraries of other experiments cannot be imported."""
    folder = tmp_path_factory.mktemp("accelerator")
    for name in ABSENT:
        (folder / f"{name}.py").write_text("raise RuntimeError('not to be imported')\n")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = os.pathsep.join([str(folder), str(ROOT)])
    out = folder / "out"
    program = BENCHMARKS / "accelerator.py"
    # Far more time than it takes: a busy machine is no reason to fail.
    run = subprocess.run(
        [sys.executable, program, "--small", "--minutes=60", f"--out={out}"],
        env={**env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    log = (out / "accelerator.log").read_text()
    parts = json.loads((out / "accelerator.json").read_text())
    markdown = (out / "accelerator.md").read_text()
    return types.SimpleNamespace(run=run, log=log, parts=parts, markdown=markdown)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A report of parts that are run by a program of a few lines."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(accelerator, "__file__", str(tmp_path / "program.py"))
    return accelerator.Report(tmp_path / "out")


def test_every_part_is_complete(small):
    ended = {name: part["ended"] for name, part in small.parts.items()}
    assert ended == dict.fromkeys(accelerator.PARTS, "Complete."), small.log
    assert small.run.returncode == 0, small.run.stderr


def test_rows_are_printed_as_they_are_kept(small):
    assert small.run.stdout == small.markdown
    for name, part in small.parts.items():
        text = small.markdown.split(f"\n## {name}\n")[1].split("\n## ")[0]
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(part["rows"])
        assert len({line.count(" | ") for line in lines}) == 1


def test_versions_are_those_of_this_run(small):
    found = {row["what"]: row["which"] for row in small.parts["versions"]["rows"]}
    assert found["jax"] == jax.__version__
    assert found["devices"] == 1


def test_trajectories_are_met(small):
    rows = {row["trajectory"]: row for row in small.parts["golden"]["rows"]}
    assert set(rows) == {"st3", "gmp"}
    for row in rows.values():
        assert row["steps"] == 60
        assert row["all within 1e-09"]
        assert row["zeros equal"]


def test_selection_is_timed_next_to_a_read_and_a_sort(small):
    rows = {row["selection"]: row for row in small.parts["selection"]["rows"]}
    assert rows["one read of one array"]["reads"] == 1
    assert all(row["ms"] > 0 for row in rows.values())
    exact = {name for name, row in rows.items() if row["exact"]}
    assert exact == {name for name in rows if name.startswith("threshold")}
    assert len(exact) == 5
    assert {"jnp.sort of one array", "jax.lax.top_k of one array"} < set(rows)


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_compared_with_dense_ones(small, name):
    rows = small.parts[name]["rows"]
    assert [row["method"] for row in rows] == ["ST-3", "GMP"]
    for row in rows:
        memory = row["GB"] / row["dense, GB"]
        assert row["memory, of dense"] == memory >= 1
        assert row["time, of dense"] > 0
        assert row["compile, s"] > 0
        assert 0 < row["loss at the end"] < 10
        assert row["equal bits twice"]


def test_digits_are_trained_to_their_sparsity(small):
    rows = {row["method"]: row for row in small.parts["digits"]["rows"]}
    assert set(rows) == {"dense", "ST-3", "GMP"}
    assert rows["dense"]["zeros"] == 0
    for method in ("ST-3", "GMP"):
        row = rows[method]
        assert row["zeros"] == math.floor(0.9 * (row["weights"] - 1)) + 1
        assert row["equal bits twice"]


@pytest.mark.parametrize(
    ("model", "inputs", "kernels", "weights"),
    [
        (accelerator.ResNet(), np.zeros((1, 64, 64, 3), np.float32), 54, 25_502_912),
        (accelerator.Transformer(), np.zeros((1, 1024), np.int32), 49, 97_517_568),
    ],
)
def test_networks_are_as_large_as_they_say(model, inputs, kernels, weights):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    leaves = jax.tree_util.tree_leaves_with_path(shapes["params"])
    sizes = [leaf.size for path, leaf in leaves if path[-1].key == "kernel"]
    assert (len(sizes), sum(sizes)) == (kernels, weights)


def test_a_threshold_that_is_not_exact_is_seen(monkeypatch):
    monkeypatch.setattr(accelerator, "threshold", lambda *args, **_: jnp.float32(0.01))
    rows = list(accelerator.selection(small=True))
    exact = [row["exact"] for row in rows if row["selection"].startswith("threshold")]
    assert exact == [False] * 5


def test_a_difference_is_relative_and_never_lost():
    theirs = np.array([1.0, 1e-20])
    assert accelerator.distance(theirs, theirs) == 0
    assert accelerator.distance([1 + 2e-9, 1e-20], theirs) == pytest.approx(2e-9, 1e-3)
    assert accelerator.distance([1.0, 1e-12], theirs) > accelerator.TOLERANCE
    assert accelerator.distance([np.nan, 1e-20], theirs) == math.inf


def test_a_part_that_fails_keeps_its_rows_and_says_why(report):
    report.begin("golden", "About.")
    sentence = accelerator.run_part("golden", False, 600, report)
    assert sentence == "Failed with exit code 1: ValueError: no luck"
    assert report.parts["golden"]["rows"] == [{"method": "first", "ms": 1234.5678}]
    assert "| first | 1235 |" in report.markdown.read_text()
    assert "said by a library" in report.log.read_text()


def test_a_part_is_stopped_at_its_limit(report):
    report.begin("selection", "About.")
    sentence = accelerator.run_part("selection", False, 1, report)
    assert sentence == "Stopped at its limit of 1 s."


def test_a_part_goes_on_after_one_that_failed(report, tmp_path, capsys):
    out = tmp_path / "out"
    assert not accelerator.run(["golden", "digits"], False, 60, out)
    parts = json.loads((out / "accelerator.json").read_text())
    assert parts["golden"]["ended"].startswith("Failed")
    assert parts["digits"]["ended"] == "Complete."
    assert [row["method"] for row in parts["digits"]["rows"]] == ["first", "second"]
    assert "| second |  |" in capsys.readouterr().out


def test_no_part_begins_when_the_time_is_over(report, tmp_path):
    assert not accelerator.run(["digits"], False, 0.05, tmp_path / "out")
    text = (tmp_path / "out" / "accelerator.md").read_text()
    assert "Not run: the 0.05 minutes are over." in text


def test_an_unknown_part_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--parts=golden,sorting"])
    with pytest.raises(SystemExit):
        accelerator.main()
    assert "got sorting" in capsys.readouterr().err
