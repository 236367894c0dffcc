"""The main job, run for real on the smallest network: trains, reports, resumes."""

import json
import sys

import jax
import numpy as np
import pytest
from training import last_state, same_bits, tiny

import st3jax
import train
from data import input_pipeline, sources
from data.source import Unreadable
from errors import UserError
from job import steps
from job.build import build
from models.layers import BATCH_AXIS
from workdir.monitor import read_metrics

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
    """Data sets are prepared in a folder of the test run."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BUILDERS", {"digits": _builder_in(folder)})
        yield folder


def _builder_in(folder):
    builder = sources.BUILDERS["digits"]
    return lambda data_dir, **options: builder(data_dir=data_dir or folder, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """The workdir and the report of an undisturbed run, with its replicas compared.

    Settings that make no job were given before, and left nothing in the workdir.
    """
    workdir = tmp_path_factory.mktemp("finished") / "run"
    too_short = tiny(**{"sparsity.begin_epoch": 0.0, "sparsity.end_epoch": 0.02})
    with pytest.raises(UserError, match="the ramp ends at step 0, not after it begins"):
        train.train_and_evaluate(too_short, workdir)
    assert not workdir.exists()
    unreplicate, compared = train.jax_utils.unreplicate, []

    def compare(tree):
        for leaf in jax.tree.leaves(jax.device_get(tree)):
            compared.append({replica.tobytes() for replica in leaf})
            assert len(leaf) == 8
        return unreplicate(tree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.jax_utils, "unreplicate", compare)
        report = train.train_and_evaluate(tiny(), workdir)
    assert {len(replicas) for replicas in compared} == {1}
    return workdir, report


def test_the_report_says_what_was_trained(finished):
    workdir, report = finished
    assert report == json.loads((workdir / "report.json").read_text())
    weights = report["weights"]
    zeros = weights - report["nonzero_weights"]
    assert zeros == int(0.6 * (weights - 1)) + 1
    assert report["sparsity"] == zeros / weights
    assert sum(layer["zeros"] for layer in report["layers"].values()) == zeros
    assert report["test_accuracy"] > 0.3
    assert report["seed"] == tiny().seed
    assert report["config"]["sparsity"]["final"] == 0.6
    left = [
        (layer["weights"] - layer["zeros"]) * layer["multiply_adds_per_weight"]
        for layer in report["layers"].values()
    ]
    assert report["multiply_adds"] == sum(left) < report["dense_multiply_adds"]


def test_the_run_leaves_figures_and_logs(finished):
    workdir, report = finished
    for name in ("course.png", "layers.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    page = (workdir / "report.html").read_text()
    assert f"{report['weights']:,} kernel weights exactly zero" in page
    assert list((workdir / "tensorboard").iterdir())
    rows = read_metrics(workdir)
    tests = [row for row in rows if "test_accuracy" in row]
    assert [row["step"] for row in tests] == [22, 44, 66]
    assert tests[-1]["test_accuracy"] == report["test_accuracy"]
    assert {"train_loss", "train_accuracy", "images_per_second"} <= rows[0].keys()


def test_raw_and_effective_weights_are_recorded_before_the_mask_is_fixed(finished):
    workdir, report = finished
    found = json.loads((workdir / "histograms.json").read_text())
    kernels = found["kernels"]
    assert found["step"] == report["fine_tuning_begins"] - 1 == 43
    assert kernels.keys() == report["layers"].keys()
    assert sum(kernel["zeros"] for kernel in kernels.values()) == zeros(report)
    (threshold,) = {t for kernel in kernels.values() for t in kernel["thresholds"]}
    assert threshold > 0
    for path, kernel in kernels.items():
        assert kernel["weights"] == report["layers"][path]["weights"]
        assert sum(kernel["raw"]) >= 0.99 * kernel["weights"] - 2
        left = kernel["weights"] - kernel["zeros"]
        assert 0.98 * left - 2 <= sum(kernel["effective"]) <= left


def train_and_interrupt(config, workdir, monkeypatch):
    """Stops between two checkpoints."""
    split, calls = train.split_over_devices, []

    def interrupt(batch):
        calls.append(batch)
        if len(calls) == 36:
            raise KeyboardInterrupt
        return split(batch)

    with monkeypatch.context() as patched:
        patched.setattr(train, "split_over_devices", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config, workdir)
    assert last_state(workdir)[0] == 22


def test_an_interrupted_run_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    train_and_interrupt(tiny(), tmp_path, monkeypatch)
    report = train.train_and_evaluate(tiny(), tmp_path)

    step, state = last_state(tmp_path)
    expected_step, expected = last_state(finished[0])
    assert step == expected_step == 66
    assert same_bits(state, expected)
    assert report == finished[1]
    for name in ("report.json", "histograms.json"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    rows = read_metrics(tmp_path)
    undisturbed = read_metrics(finished[0])
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed]


def test_an_ended_run_reports_again_without_training(finished, monkeypatch):
    monkeypatch.delattr(train, "split_over_devices")
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"test_accuracy": 0.125})
    report = train.train_and_evaluate(tiny(), finished[0])
    assert report == finished[1] | {"test_accuracy": 0.125}


class Damaged:
    """A source of which some images cannot be read, or none any more."""

    def __init__(self, source, broken=()):
        self.source = source
        self.broken = broken

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.broken:
            raise Unreadable(f"the image {index} cannot be read", "mend it")
        return self.source[index]


@pytest.fixture
def damaged(monkeypatch):
    """The configuration of a run, and its data, of which images may be broken."""
    config = tiny(**{"data.in_memory": False, "data.broken_images": "skip"})
    data = sources.load(config)
    data = data._replace(train=Damaged(data.train), test=Damaged(data.test))
    monkeypatch.setattr(sources, "load", lambda config: data)
    return config, data


def test_images_that_are_left_out_are_told(damaged, tmp_path, monkeypatch, capsys):
    config, data = damaged
    data.train.broken = range(5, 1000, 100)
    data.test.broken = {7, 8}
    whole = train.train_and_evaluate(config, tmp_path / "whole")
    rows = read_metrics(tmp_path / "whole")
    skipped = sum(row.get("skipped_images", 0) for row in rows)
    assert 20 <= skipped <= 30  # of 10 in each of 3 epochs, some that fill no batch
    assert (whole["skipped_images"], whole["skipped_test_images"]) == (skipped, 2)
    assert {x["skipped_test_images"] for x in rows if "test_loss" in x} == {2}
    out = " ".join(capsys.readouterr().out.split())
    left_out = "images left out, for they could not be read:"
    assert f"{left_out} {skipped} while training, 2 of the test images report" in out
    assert "test images left out so far, for they could not be read: 2 " in out

    train_and_interrupt(config, tmp_path / "parts", monkeypatch)
    assert train.train_and_evaluate(config, tmp_path / "parts") == whole
    assert train.train_and_evaluate(config, tmp_path / "parts") == whole  # ended


def test_a_run_whose_data_is_gone_ends(damaged, tmp_path, monkeypatch):
    config, data = damaged
    split, calls = train.split_over_devices, []

    def gone_after(batch):
        calls.append(batch)
        if len(calls) == 25:
            data.train.broken = range(len(data.train))
        return split(batch)

    with monkeypatch.context() as patched:
        patched.setattr(train, "split_over_devices", gone_after)
        with pytest.raises(UserError, match=r"^the last 64 images could not be read: "):
            train.train_and_evaluate(config, tmp_path)
    assert last_state(tmp_path)[0] == 22
    data.train.broken, data.test.broken = (), range(len(data.test))
    with pytest.raises(UserError, match=r"none of the 359 test images can be read any"):
        train.train_and_evaluate(config, tmp_path)


def test_a_batch_of_broken_images_is_no_reason_to_end_yet():
    valid, none = np.array([False, True] * 5), np.zeros(10, bool)
    assert train.unread_in_a_row(22, valid) == 0
    assert train.unread_in_a_row(0, none) == 10
    assert train.unread_in_a_row(21, none) == 31
    with pytest.raises(UserError, match="the last 32 images could not be read"):
        train.unread_in_a_row(22, none)


def test_images_that_no_memory_holds_are_told_and_counted():
    data = sources.Data([1] * 3000, [1] * 4, 10)
    assert train.images_of(data) == "3,000 to train on, 4 to test on"
    assert train.images_of(data._replace(skipped_test=1)) == (
        "3,000 to train on, 4 to test on, without 0 and 1 that could not be read"
    )


def test_the_dense_network_has_no_zeros(tmp_path):
    report = train.train_and_evaluate(tiny(**{"sparsity.method": "none"}), tmp_path)
    header = st3jax.read_header(tmp_path / "model.st3")
    assert not any("kept" in leaf for leaf in header["leaves"])
    assert header["metadata"]["sparsity"] == 0
    assert not (tmp_path / "model_ema.st3").exists()
    assert report["sparsity"] == 0.0


def test_zeros_stay_while_fine_tuning(finished):
    rows = read_metrics(finished[0])
    fixed = [row["sparsity"] for row in rows if row["step"] >= 44]
    assert fixed
    assert set(fixed) == {np.float32(finished[1]["sparsity"])}


def test_two_epochs_see_the_same_images_in_another_order(data_dir):
    config = tiny()
    config.batch_size = 1
    data = sources.load(config)
    batches = input_pipeline.train_batches(data, config, start=0)
    epochs = [
        [next(batches)["image"].tobytes() for _ in range(len(data.train))]
        for _ in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_every_test_image_is_seen_exactly_once(data_dir):
    config = tiny()
    config.batch_size = 100
    data = sources.load(config)
    batches = list(input_pipeline.test_batches(data, config))
    assert {len(batch["label"]) for batch in batches} == {100}
    seen = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
    np.testing.assert_array_equal(seen, [x["image"] for x in data.test])


def test_train_and_test_images_are_disjoint(data_dir):
    data = sources.load(tiny())
    train_images = {x["image"].tobytes() for x in data.train}
    assert len(data.train) + len(data.test) == 1797
    assert not [x for x in data.test if x["image"].tobytes() in train_images]


def test_one_device_and_two_take_the_same_step(data_dir):
    config = tiny()
    config.data.augmentation = "none"
    job = build(config)
    config = job.config
    batch = next(input_pipeline.train_batches(job.data, config, start=0))
    state = steps.create_train_state(config, job.model, job.tx)
    results = []
    for count in (1, 2):
        step = jax.pmap(
            lambda state, batch: steps.train_step(state, batch, config),
            BATCH_AXIS,
            in_axes=(None, 0),
            devices=jax.local_devices()[:count],
        )
        parts = {k: x.reshape(count, -1, *x.shape[1:]) for k, x in batch.items()}
        new, _ = step(state, parts)
        results.append(jax.device_get((new.params, new.batch_stats)))
    one, two = results
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(b[0], a[0], rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(b[0], b[1])


def test_no_tensorflow_is_imported(finished):
    assert "tensorflow" not in sys.modules


def asked(report):
    return int(0.6 * (report["weights"] - 1)) + 1


def zeros(report):
    return report["weights"] - report["nonzero_weights"]


def test_lrr_trains_in_cycles(tmp_path):
    config = tiny(**{"sparsity.method": "lrr", "lrr.keep": 0.4})
    report = train.train_and_evaluate(config, tmp_path)
    assert zeros(report) == asked(report)
    assert report["steps"] == 22 * 2 * 2  # one pruning, two cycles, no fine-tuning
    rows = [row for row in read_metrics(tmp_path) if "train_loss" in row]
    sparsities = np.array([row["sparsity"] for row in rows])
    first = np.array([row["step"] < 44 for row in rows])
    assert first.any()
    np.testing.assert_array_equal(sparsities[first], 0)
    np.testing.assert_allclose(sparsities[~first], report["sparsity"], rtol=1e-6)


def test_granet_grows_and_prunes(tmp_path):
    fields = {"sparsity.method": "granet", "sparsity.update_every_steps": 10}
    config = tiny(**fields)
    report = train.train_and_evaluate(config, tmp_path)
    assert asked(report) <= zeros(report) <= asked(report) + 20  # some just grown
    assert report["steps"] == 22 * 2


def test_probmask_resumes_to_the_same_bits(tmp_path, monkeypatch):
    config = tiny(**{"sparsity.method": "probmask"})
    report = train.train_and_evaluate(config, tmp_path / "whole")
    assert zeros(report) == asked(report)
    train_and_interrupt(config, tmp_path / "parts", monkeypatch)
    assert train.train_and_evaluate(config, tmp_path / "parts") == report
    expected, state = (last_state(tmp_path / name) for name in ("whole", "parts"))
    assert state[0] == expected[0] == 66
    assert same_bits(state[1], expected[1])
