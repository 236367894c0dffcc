"""What kills, damage, full disks and spoiled numbers leave of a run."""

import contextlib
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from programs import train_checked
from rich.console import Console
from training import command, last_state, leaves, same_bits, tiny
from workdirs import (
    STEPS,
    WHERE_DISKS_FAIL,
    at_step,
    collect_garbage,
    copied,
    expect_the_same_end,
    flip,
    folder,
    metrics,
    names,
    overrides,
    read,
    small,
    three_saves,
    undisturbed,
)

import processes
import train
from errors import Stopped, UserError
from job import steps
from workdir import checkpoints, files, monitor
from workdir.claim import claim_workdir

__all__ = ["collect_garbage", "folder", "overrides", "three_saves", "undisturbed"]
pytestmark = WHERE_DISKS_FAIL


# A small tree, saved and read again.


def inside(workdir, step="3"):
    """Paths of all files of a checkpoint, and of its folders, within the workdir."""
    paths = sorted((workdir / "checkpoints" / step).rglob("*"))
    files = [x.relative_to(workdir) for x in paths if x.is_file()]
    folders = [x.relative_to(workdir) for x in paths if x.is_dir()]
    assert len(files) > 8
    return files, folders


HARMS = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
}


def expect_the_same_or_the_one_before(workdir):
    """Never other bits, never a checkpoint left out in silence; which it was."""
    found, said = read(workdir)
    step = int(found["['step']"])
    assert same_bits(found, leaves(small(step)))
    if step == 3:
        assert "warning" not in said
    else:
        assert step == 2
        assert "warning: the checkpoint of step 3 is damaged" in said
        assert "going on from the one of step 2" in said
        assert read(workdir)[1] == ""  # what is damaged is gone
    return step


@pytest.mark.parametrize("harm", HARMS)
def test_any_file_of_a_checkpoint_may_be_damaged(three_saves, harm):
    fell_back = set()
    for path in inside(three_saves)[0]:
        with copied(three_saves) as workdir:
            HARMS[harm](workdir / path)
            if expect_the_same_or_the_one_before(workdir) == 2:
                fell_back.add(path.parts[3])
    assert {"_METADATA", "metadata", "d", "manifest.ocdbt"} <= fell_back


def test_any_folder_of_a_checkpoint_may_be_gone(three_saves):
    folders = inside(three_saves)[1]
    found = {}
    for path in folders:
        with copied(three_saves) as workdir:
            shutil.rmtree(workdir / path)
            found[path.name] = expect_the_same_or_the_one_before(workdir)
    assert found["state"] == found["digest"] == 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_bit_of_a_checkpoint_may_flip(three_saves, data):
    path = data.draw(st.sampled_from(inside(three_saves)[0]))
    size = (three_saves / path).stat().st_size
    byte, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    with copied(three_saves) as workdir:
        flip(workdir / path, byte, bit)
        expect_the_same_or_the_one_before(workdir)


def test_other_bits_than_were_written_are_damage(three_saves):
    with copied(three_saves) as workdir:
        path = workdir / "checkpoints" / "3" / "digest" / "metadata"
        digest = json.loads(path.read_text())
        digest["blake2b"] = digest["blake2b"][::-1]
        path.write_text(json.dumps(digest))
        assert expect_the_same_or_the_one_before(workdir) == 2


def test_an_array_of_an_unknown_kind_is_damage(three_saves):
    with copied(three_saves) as workdir:
        path = workdir / "checkpoints" / "3" / "state" / "_METADATA"
        before, _, after = path.read_text().rpartition("np.ndarray")
        path.write_text(f"{before}np.ndarraz{after}")
        assert expect_the_same_or_the_one_before(workdir) == 2


def test_only_damaged_checkpoints_end_in_one_sentence(three_saves):
    with copied(three_saves) as workdir:
        for step in ("2", "3"):
            (workdir / "checkpoints" / step / "state" / "manifest.ocdbt").unlink()
        there = sorted((workdir / "checkpoints").rglob("*"))
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged") as x:
            read(workdir)
        assert "remove that folder" in str(x.value)
        assert "\n" not in str(x.value)
        assert sorted((workdir / "checkpoints").rglob("*")) == there


def test_a_checkpoint_of_another_model_is_not_damage(three_saves):
    with copied(three_saves) as workdir:
        other = small(0) | {"kernel": jnp.zeros((17, 4))}
        with (
            checkpoints.open_checkpoints(workdir) as manager,
            pytest.raises(UserError, match="of another model") as error,
        ):
            checkpoints.restore(manager, other, Console(quiet=True))
        assert "kernel is (17, 3) there and (17, 4) here" in str(error.value)
        assert expect_the_same_or_the_one_before(workdir) == 3


def test_an_unfinished_save_is_no_checkpoint(three_saves):
    with copied(three_saves) as workdir:
        folder = workdir / "checkpoints"
        shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
        assert expect_the_same_or_the_one_before(workdir) == 3
        assert {x.name for x in folder.iterdir()} == {"2", "3"}


def test_steps_after_a_damaged_checkpoint_are_saved_again(three_saves):
    with copied(three_saves) as workdir:
        HARMS["empty"](workdir / "checkpoints" / "3" / "state" / "manifest.ocdbt")
        read(workdir)
        with checkpoints.open_checkpoints(workdir) as manager:
            checkpoints.save(manager, 3, small(3))
            checkpoints.wait(manager)
        assert expect_the_same_or_the_one_before(workdir) == 3


def test_saving_does_not_ask_whether_to_stop(tmp_path, monkeypatch):
    asked = []
    question = "reached_preemption_sync_point"
    monkeypatch.setattr(multihost_utils, question, asked.append)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, 1, small(1))
        checkpoints.wait(manager)
    assert asked == []


# Other files in the workdir.


def test_a_kill_leaves_a_whole_configuration_or_none(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, killed)
            with pytest.raises(KeyboardInterrupt):
                claim_workdir(tmp_path, tiny())
        assert not (tmp_path / "config.json").exists()
    claim_workdir(tmp_path, tiny())
    there = (tmp_path / "config.json").read_text()
    assert json.loads(there)["seed"] == tiny().seed
    claim_workdir(tmp_path, tiny())
    advised = {"data.broken_images": "skip", "data.max_pixels": 10**9}
    claim_workdir(tmp_path, tiny(**advised))  # by what ended the run
    with pytest.raises(UserError, match="holds a run with other settings"):
        claim_workdir(tmp_path, tiny(seed=4))
    assert (tmp_path / "config.json").read_text() == there
    (tmp_path / "config.json").write_text(there[:-9])
    with pytest.raises(UserError, match=r"config\.json is damaged: choose another"):
        claim_workdir(tmp_path, tiny())


def test_the_network_of_another_program_is_no_workdir(tmp_path):
    (tmp_path / "model.st3").write_text("of transformer.py")
    with pytest.raises(UserError, match=r"a network of another program, model\.st3"):
        claim_workdir(tmp_path, tiny())
    assert [path.name for path in tmp_path.iterdir()] == ["model.st3"]


def test_metrics_survive_a_kill_at_any_byte_and_at_the_next_start(
    tmp_path, monkeypatch
):
    path = tmp_path / monitor.METRICS
    rows = [{"step": step, "train_loss": 0.1 * step} for step in (11, 22, 33)]
    lines = [json.dumps(row) + "\n" for row in rows]
    whole = "".join(lines)
    for size in range(len(whole) + 1):
        path.write_text(whole[:size])
        kept = monitor.read_metrics(tmp_path)
        assert kept == rows[: len(kept)]
        assert len(kept) >= whole[:size].count("\n")

    path.write_text(whole + '{"step": 44, "tra')

    def killed(*_):
        raise KeyboardInterrupt

    quiet = Console(quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            monitor.Monitor(tmp_path, quiet, 22, 66)
    assert monitor.read_metrics(tmp_path) == rows
    with monitor.Monitor(tmp_path, quiet, 22, 66) as logs:
        assert path.read_text() == "".join(lines[:2])
        logs.record(33, {"train_loss": 0.5})
        assert monitor.read_metrics(tmp_path)[2:] == [{"step": 33, "train_loss": 0.5}]


def test_kernels_of_which_nothing_is_left_are_named_once(tmp_path):
    console = Console(file=io.StringIO(), width=400)
    with monitor.Monitor(tmp_path, console, 0, 9) as logs:
        logs.tell_vanished(1, [])
        logs.tell_vanished(2, ["stem/kernel", "mlp/kernel[1]"])
        logs.tell_vanished(3, ["stem/kernel", "mlp/kernel[1]", "mlp/kernel[2]"])
        logs.tell_vanished(4, ["mlp/kernel[2]"])
    told = [line for line in console.file.getvalue().splitlines() if "zero" in line]
    assert len(told) == 2
    assert told[0].startswith("step 2: every weight is zero in stem/kernel, mlp/kern")
    assert told[1].startswith("step 3: every weight is zero in mlp/kernel[2], so that")


def test_images_that_are_left_out_are_told_when_they_are_twice_as_many(tmp_path):
    console = Console(file=io.StringIO(), width=400)
    with monitor.Monitor(tmp_path, console, 0, 99) as logs:
        for step, skipped in enumerate([0, 3, 0, 2, 1, 4], start=1):
            logs.record(step, {"train_loss": 0.5, "skipped_images": skipped})
        for step in (7, 8):
            logs.record(step, {"skipped_test_images": 2})
    with monitor.Monitor(tmp_path, console, 5, 99) as logs:  # as after a kill
        logs.record(6, {"skipped_images": 5})
        logs.record(7, {"skipped_images": 1})
    told = [line for line in console.file.getvalue().splitlines() if "left out" in line]
    so_far = "left out so far, for they could not be read"
    assert told == [
        f"step 2: training images {so_far}: 3",
        f"step 5: training images {so_far}: 6",
        f"step 7: test images {so_far}: 2",
        f"step 7: training images {so_far}: 12",
    ]
    assert monitor.skipped_images(monitor.read_metrics(tmp_path)) == 12


@contextlib.contextmanager
def no_file_above(size):
    """Files that grow past this many bytes refuse to, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_logs_on_a_full_disk_end_in_one_sentence(tmp_path):
    refused = pytest.raises(UserError, match="the checkpoints before are intact")
    logs = monitor.Monitor(tmp_path, Console(quiet=True), 0, 10_000)
    with no_file_above(16384), refused as error, logs:  # and does not wait for ever
        for step in range(1, 10_000):
            logs.record(step, {"train_loss": 1.0, "sparsity": 0.5})
    assert str(error.value).startswith(f"writing to {tmp_path} failed")
    rows = monitor.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 50


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_ends(number):
    def ends(*_):
        raise InterruptedError

    before = signal.signal(number, ends)
    try:
        with processes.asked_to_stop() as asked_to_stop:
            assert not asked_to_stop(1)
            os.kill(os.getpid(), number)
            assert asked_to_stop(2)
            assert asked_to_stop(3)
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is ends
    finally:
        signal.signal(number, before)


# Whole runs.


def checked(fate, workdir, overrides):
    """What starts the same run, to which something happens at a step."""
    python, program, *arguments = command(workdir, **overrides)
    experiments = pathlib.Path(program).parent
    path = f"{experiments.parent}{os.pathsep}{experiments}"
    return {
        "args": [python, train_checked.__file__, fate, *arguments],
        "env": os.environ | {"PYTHONPATH": path},
        "text": True,
    }


def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(
    undisturbed, overrides, tmp_path
):
    run = subprocess.Popen(
        **checked("hold22", tmp_path, overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def saving():
        return any(x.startswith("22.") for x in names(tmp_path))

    while run.poll() is None and not saving():
        time.sleep(0.001)
    run.kill()
    output = run.communicate()[0]
    assert run.returncode == -signal.SIGKILL, output
    assert saving()
    assert "11" in names(tmp_path)
    assert not (tmp_path / "report.json").exists()
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert all(x.isdigit() for x in names(tmp_path))
    expect_the_same_end(tmp_path, undisturbed)
    assert metrics(tmp_path) == metrics(undisturbed)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_another_time(
    undisturbed, overrides, tmp_path, monkeypatch, capsys
):
    run = subprocess.run(
        **checked("terminate12", tmp_path, overrides), capture_output=True
    )
    assert run.returncode == 0
    assert run.stderr == "\nstopping after this step; once more ends at once\n"
    step = max(int(x) for x in names(tmp_path))
    told = f"asked to stop: saved after step {step} of {STEPS}; the same command goes"
    assert told in " ".join(run.stdout.split())

    def interrupt(batch):
        os.kill(os.getpid(), signal.SIGINT)
        return batch

    with monkeypatch.context() as patch:
        at_step(patch, step + 3, interrupt)
        with pytest.raises(Stopped, match=f"saved after step {step + 3} of {STEPS}"):
            train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert str(step + 3) in names(tmp_path)
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert f"{step + 3} to {STEPS}, 22 an epoch" in capsys.readouterr().out
    expect_the_same_end(tmp_path, undisturbed)


def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    undisturbed, overrides, tmp_path, capsys
):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (data,) = (tmp_path / "checkpoints" / str(STEPS) / "state" / "d").iterdir()
    flip(data, data.stat().st_size // 2)
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    said = capsys.readouterr().out
    assert f"the checkpoint of step {STEPS} is damaged" in said
    assert f"{STEPS - 11} to {STEPS}, 22 an epoch" in said
    expect_the_same_end(tmp_path, undisturbed)


def test_a_full_disk_ends_the_run_with_a_sentence(undisturbed, overrides, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    limited = (
        "import resource, subprocess, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    )
    run = subprocess.run(
        [sys.executable, "-c", limited, *command(tmp_path, **overrides)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: writing to {tmp_path}")
    assert run.stderr.count("\n") == 1
    assert {x for x in names(tmp_path) if x.isdigit()} == {str(STEPS - 11)}
    with copied(undisturbed) as expected:
        shutil.rmtree(expected / "checkpoints" / str(STEPS))
        step, state = last_state(expected)
        assert last_state(tmp_path)[0] == step == STEPS - 11
        assert same_bits(last_state(tmp_path)[1], state)


# Numbers that are not finite.


def poison(monkeypatch, step):
    """Makes the numbers of one batch NaN, where the network sees them."""
    augment = steps.augment

    def poisoned(images, key, config):
        plain = images.max() == images.min()
        return jnp.where(plain, jnp.nan, augment(images, key, config))

    def spoil(batch):
        return batch | {"image": np.zeros_like(batch["image"])}

    monkeypatch.setattr(steps, "augment", poisoned)
    at_step(monkeypatch, step, spoil)


def test_a_step_that_is_not_finite_ends_the_run_before_it_is_saved(
    undisturbed, overrides, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        poison(patch, 30)
        with pytest.raises(UserError) as error:
            train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert "step 30, whose loss is nan" in str(error.value)
    assert "the activations at stage1_block1_norm1/mean" in str(error.value)
    assert names(tmp_path) == {"11", "22"}
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    expect_the_same_end(tmp_path, undisturbed)


def test_a_step_that_is_not_finite_can_be_skipped(overrides, tmp_path, monkeypatch):
    poison(monkeypatch, 30)
    config = tiny(**overrides, not_finite="skip")
    report = train.train_and_evaluate(config, tmp_path)
    rows = [row for row in metrics(tmp_path) if "train_loss" in row]
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 1, 0, 0, 0]
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    step, state = last_state(tmp_path)
    assert step == STEPS
    assert all(np.isfinite(leaf).all() for leaf in state.values())
    assert report["test_accuracy"] > 0.3
