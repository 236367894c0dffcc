"""Runs that meet each other, and disks, terminals and inputs that fail."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image
from rich.console import Console
from training import command, leaves, same_bits, tiny
from workdirs import (
    STEPS,
    WHERE_DISKS_FAIL,
    at_step,
    collect_garbage,
    copied,
    expect_the_same_end,
    few_files,
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

import terminal
import train
from errors import Stopped, UserError
from workdir import checkpoints, digests, files, monitor
from workdir.claim import claim_workdir
from workdir.lock import only_run

__all__ = ["collect_garbage", "folder", "overrides", "three_saves", "undisturbed"]
pytestmark = WHERE_DISKS_FAIL

NOBODY = 65534
SECONDS = 240  # in which nothing that does not hang takes this long


# Two runs in one workdir.


def test_a_workdir_has_one_run_at_a_time(tmp_path):
    workdir = tmp_path / "run"
    with only_run(workdir):
        with pytest.raises(UserError) as error, only_run(workdir):
            pass
        told = str(error.value)
        assert told.startswith("another run (on ")
        assert f", process {os.getpid()}, since 20" in told
        assert f"is using the workdir {workdir}: wait for its end" in told
        assert "\n" not in told
    with only_run(workdir):
        (workdir / "owner.json").write_text("[")
        with (
            pytest.raises(UserError, match=r"^another run is using"),
            only_run(workdir),
        ):
            pass


HOLD = """
import pathlib, sys, time
from workdir.lock import only_run
with only_run(pathlib.Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_run_that_was_killed_keeps_nobody_out(tmp_path):
    experiments = pathlib.Path(train.__file__).parent
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(experiments)},
    )
    with run:
        assert run.stdout.readline() == "here\n"
        told = f"process {run.pid}, "
        with pytest.raises(UserError, match=told), only_run(tmp_path):
            pass
        run.kill()
    with only_run(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["process"] != run.pid


def test_a_second_run_touches_nothing(undisturbed, overrides, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "report.json").unlink()
    with only_run(tmp_path):
        written = [x for x in tmp_path.rglob("*") if x.name != "lock"]
        before = [x.stat().st_mtime_ns for x in written]
        with pytest.raises(UserError, match="another run"):
            train.train_and_evaluate(tiny(**overrides), tmp_path)
        assert [x.stat().st_mtime_ns for x in written] == before
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert not (tmp_path / "owner.json").exists()


# Checkpoints that cannot be read, and what is none.


@contextlib.contextmanager
def as_somebody_else():
    """Without the rights of root, which every file is open to."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def everything(workdir):
    """All files below a folder, with their contents."""
    return {x: x.read_bytes() for x in sorted(workdir.rglob("*")) if x.is_file()}


@pytest.mark.parametrize(
    "name", ["state/manifest.ocdbt", "state/_METADATA", "files.json", "digest/metadata"]
)
def test_a_checkpoint_without_permission_is_told_and_left_alone(three_saves, name):
    with copied(three_saves) as workdir:
        path = workdir / "checkpoints" / "3" / name
        for each in (workdir, *workdir.rglob("*")) if os.geteuid() == 0 else ():
            os.chown(each, NOBODY, NOBODY)
        before = everything(workdir)
        path.chmod(0)
        with (
            open_for_all(workdir),
            as_somebody_else(),
            pytest.raises(UserError) as error,
        ):
            read(workdir)
        told = str(error.value)
        assert told.startswith(f"the checkpoint {workdir / 'checkpoints' / '3'} cannot")
        assert "(Permission denied): nothing says that it is damaged" in told
        assert everything(workdir) == before


@contextlib.contextmanager
def open_for_all(path):
    """The folders above a path may be passed by everybody."""
    modes = {parent: parent.stat().st_mode for parent in path.parents}
    try:
        for parent, mode in modes.items():
            if os.geteuid() == 0 or parent.owner() == path.owner():
                parent.chmod(mode | 0o755)
        yield
    finally:
        for parent, mode in modes.items():
            if parent.stat().st_mode != mode:
                parent.chmod(mode)


def test_an_error_of_the_disk_is_no_damage(three_saves, monkeypatch):
    opened = pathlib.Path.open

    def broken(path, *args, **options):
        if path.name == "manifest.ocdbt":
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *args, **options)

    with copied(three_saves) as workdir:
        before = everything(workdir)
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "open", broken)
            with pytest.raises(UserError, match=r"cannot be read \(Input/output error"):
                read(workdir)
        assert everything(workdir) == before


def a_link(path):
    path.symlink_to("3")


def a_dead_link(path):
    path.symlink_to("nowhere")


def a_file(path):
    path.write_text("mine")


def an_empty_folder(path):
    path.mkdir()


def a_folder_of_somebody(path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


@pytest.mark.parametrize(
    ("stranger", "kind"),
    [
        (a_link, "a symbolic link"),
        (a_dead_link, "a symbolic link"),
        (a_file, "no checkpoint"),
        (an_empty_folder, "no checkpoint"),
        (a_folder_of_somebody, "no checkpoint"),
    ],
)
def test_what_has_the_name_of_a_checkpoint_only_is_told_and_left_alone(
    three_saves, stranger, kind
):
    with copied(three_saves) as workdir:
        path = workdir / "checkpoints" / "99999"
        stranger(path)
        before = everything(workdir)
        with pytest.raises(UserError) as error:
            read(workdir)
        assert str(error.value).startswith(f"{path} is {kind}, but has the name of a c")
        assert everything(workdir) == before
        assert os.path.lexists(path)


def test_other_things_beside_checkpoints_stay(three_saves):
    with copied(three_saves) as workdir:
        folder = workdir / "checkpoints"
        (folder / "notes.txt").write_text("mine")
        (folder / "old").mkdir()
        found, said = read(workdir)
        assert same_bits(found, leaves(small(3)))
        assert said == ""
        with checkpoints.open_checkpoints(workdir) as manager:
            for step in (4, 5, 6):
                checkpoints.save(manager, step, small(step))
            checkpoints.wait(manager)
        assert {x.name for x in folder.iterdir()} == {"5", "6", "notes.txt", "old"}


def test_what_is_damaged_is_moved_aside_and_never_removed(three_saves):
    with copied(three_saves) as workdir:
        for again in ("", "-1"):
            path = workdir / "checkpoints" / "3" / "state" / "manifest.ocdbt"
            flip(path, 5)
            bits = path.read_bytes()
            found, said = read(workdir)
            assert same_bits(found, leaves(small(2)))
            assert f"it is in {workdir}/damaged/3{again} now; going on from" in said
            aside = workdir / "damaged" / f"3{again}" / "state" / "manifest.ocdbt"
            assert aside.read_bytes() == bits
            with checkpoints.open_checkpoints(workdir) as manager:
                checkpoints.save(manager, 3, small(3))
                checkpoints.wait(manager)


def test_what_is_whole_but_not_understood_is_not_damage(three_saves, monkeypatch):
    def fails(*_, **__):
        raise ValueError("failed (}).): internal\n}).")

    with copied(three_saves) as workdir:
        before = everything(workdir)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._Checkpoints, "restore", fails)
            with pytest.raises(UserError) as error:
                read(workdir)
        assert r"cannot be read (ValueError: failed (}).): internal)" in str(
            error.value
        )
        assert everything(workdir) == before


# Causes.


def test_causes_are_told_in_the_words_of_the_operating_system():
    wrapped = ValueError("UNKNOWN: [type: 3]\n}).")
    wrapped.__cause__ = OSError(28, "No space left on device", "/somewhere")
    assert files.cause(wrapped) == "No space left on device"
    text = 'CRC: "/a/b": Failed to open: Disk quota exceeded [os_error_code]\n}).'
    assert files.cause(ValueError(text)) == "Disk quota exceeded"
    assert files.cause(ValueError("a\nb")) == "ValueError: a"
    assert files.cause(RuntimeError()) == "RuntimeError: "


# Signals while a run waits.


def signalled():
    """A batch that never comes, and a signal meanwhile."""

    def wait(batch):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(SECONDS)
        return batch

    return wait


def test_a_run_that_waits_for_an_image_can_be_stopped(
    undisturbed, overrides, tmp_path, monkeypatch
):
    monkeypatch.setattr(train.processes, "WAIT_SECONDS", 0.3)
    with monkeypatch.context() as patch:
        at_step(patch, 15, signalled())
        with pytest.raises(Stopped, match=f"saved after step 14 of {STEPS}"):
            train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert names(tmp_path) == {"11", "14"}
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    expect_the_same_end(tmp_path, undisturbed)


def test_a_run_that_waits_for_an_image_to_test_on_can_be_stopped(
    undisturbed, overrides, tmp_path, monkeypatch
):
    monkeypatch.setattr(train.processes, "WAIT_SECONDS", 0.3)
    test_batches = train.input_pipeline.test_batches

    def patched(data, config):
        with contextlib.closing(test_batches(data, config)) as batches:
            for number, batch in enumerate(batches):
                yield signalled()(batch) if number == 2 else batch

    with monkeypatch.context() as patch:
        patch.setattr(train.input_pipeline, "test_batches", patched)
        with pytest.raises(Stopped, match=f"saved after step 22 of {STEPS}"):
            train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert names(tmp_path) == {"11", "22"}
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    expect_the_same_end(tmp_path, undisturbed)
    assert metrics(tmp_path) == metrics(undisturbed)


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.processes.asked_to_stop() as asked_to_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked_to_stop(1)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_waiting_leaves_the_timer_of_others_alone():
    signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        with train.processes.asked_to_stop() as asked_to_stop, asked_to_stop.waiting():
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# What others leave in the workdir.


JUNK = ["[]", "5", "null", '{"step": "a"}', '{"step": 11, "test_accuracy": "x"}', "\0"]


def test_junk_among_the_metrics_is_left_out(tmp_path):
    row = '{"step": 11, "train_loss": 0.5}'
    path = tmp_path / monitor.METRICS
    path.write_bytes("\n".join([*JUNK, row, *JUNK]).encode() + b"\n\xff\xfe\n")
    assert monitor.read_metrics(tmp_path) == [json.loads(row)]
    with monitor.Monitor(tmp_path, Console(quiet=True), 11, 66):
        assert path.read_text() == row + "\n"


@pytest.mark.parametrize("junk", [*JUNK, "", "[" * 9999, "\xff"])
def test_junk_in_the_place_of_the_configuration_is_told(tmp_path, junk):
    (tmp_path / "config.json").write_bytes(junk.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json is damaged|other settings"):
        claim_workdir(tmp_path, tiny())
    assert (tmp_path / "config.json").read_bytes() == junk.encode("latin-1")


# The terminal, and the end.


def start(arguments, **options):
    """A run in a process of its own, which may not take for ever."""
    return subprocess.run(arguments, timeout=SECONDS, text=True, **options)


def test_a_reader_that_leaves_does_not_cost_the_report(
    undisturbed, overrides, tmp_path
):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "report.json").unlink()
    run = subprocess.Popen(
        command(tmp_path, **overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40"},
    )
    with run:
        run.stdout.read(1)
        run.stdout.close()
        errors = run.stderr.read()
    assert (run.returncode, errors) == (0, b"")
    assert (tmp_path / "report.json").exists()


STREAMS = """
import os, sys
import terminal
terminal.keep_streams()
for stream in (sys.stdout, sys.stderr):
    for text in ("a", "\\u2501\\n", "b" * 99999):
        print(text, file=stream, flush=True)
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
assert file > 2
os._exit(0) if len(sys.argv) > 2 else sys.exit(0)
"""


@pytest.mark.parametrize("redirected", ["", ">/dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_output_that_goes_nowhere_ends_nothing(tmp_path, redirected):
    experiments = pathlib.Path(train.__file__).parent
    shell = f'"$@" {redirected}'
    run = start(
        ["sh", "-c", shell, "sh", sys.executable, "-c", STREAMS, tmp_path / "file"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(experiments), "PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0
    if not redirected:
        assert run.stdout.startswith("a\n?\n\nbbb")
        assert run.stderr == run.stdout


def test_an_error_that_nobody_foresaw_is_a_sentence_and_a_file(tmp_path, capsys):
    def fails():
        raise KeyError("the\nkey")

    for workdir, place in (
        (tmp_path, tmp_path),
        (tmp_path / "gone", pathlib.Path(terminal.tempfile.gettempdir())),
    ):
        try:
            fails()
        except KeyError as error:
            told = terminal.tell_crash(error, workdir)
        (file,) = place.glob(f"crash-*-{os.getpid()}.txt")
        assert "in fails" in file.read_text()
        assert told.startswith("unexpected KeyError: 'the\\nkey'; the whole traceback")
        assert str(file) in told
        assert "\n" not in told
        file.unlink()


CRASH = """
import sys
import train
from absl import app, logging
logging.set_verbosity(logging.FATAL)
def fails(*_, **__):
    raise ZeroDivisionError("of somebody")
train.train_and_evaluate = fails
app.run(train.main, flags_parser=train.parse_flags)
"""


def test_the_last_net_ends_with_a_status(tmp_path):
    _, program, *arguments = command(tmp_path)
    experiments = pathlib.Path(program).parent
    run = start(
        [sys.executable, "-c", CRASH, *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(experiments)},
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: unexpected ZeroDivisionError: of somebody; th")
    assert run.stderr.endswith("the same command goes on from the last one\n")
    assert run.stderr.count("\n") == 1
    (file,) = tmp_path.iterdir()
    assert "ZeroDivisionError: of somebody" in file.read_text()


# Disks.


@pytest.mark.parametrize(("number", "workers"), [(6, 0), (24, 0), (46, 2)])
def test_a_disk_without_room_for_files_ends_the_run_at_once(
    overrides, tmp_path, number, workers
):
    decoding = {"data.in_memory": False, "data.workers": workers} if workers else {}
    with few_files(tmp_path, number) as limited:
        run = subprocess.Popen(
            [*limited, *command(tmp_path / "run", **overrides, **decoding)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        told = run.stderr.readline()
        status = run.wait(timeout=5)  # not a matter of speed: it used to be minutes
        assert run.stderr.read() == ""
        run.stderr.close()
    assert status == 1
    assert told.startswith("error: writing to ") or "cannot be written to (" in told
    assert "No space left on device" in told or "File too large" in told


@pytest.mark.parametrize("name", ["report.json", "course.png", "report.html"])
def test_a_report_that_cannot_be_written_is_told_and_made_the_next_time(
    undisturbed, overrides, tmp_path, name
):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    (tmp_path / f"{name}.draft").mkdir()
    with pytest.raises(UserError, match=f"writing to {tmp_path} failed .Is a directo"):
        train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert not (tmp_path / name).exists()
    (tmp_path / f"{name}.draft").rmdir()
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert (tmp_path / name).exists()
    expect_the_same_end(tmp_path, undisturbed)


def test_a_workdir_that_is_removed_meanwhile_is_told(
    undisturbed, overrides, tmp_path, monkeypatch
):
    shutil.copytree(undisturbed, tmp_path / "run")
    write_report = train.report.write_report

    def removed(workdir, *args):
        shutil.rmtree(workdir)
        return write_report(workdir, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.report, "write_report", removed)
        with pytest.raises(UserError, match=r"failed \(No such file or directory"):
            train.train_and_evaluate(tiny(**overrides), tmp_path / "run")


# Data that changes.


def class_folders(root):
    """A data set of two classes, of images of one colour."""
    for split, number in (("train", 64), ("test", 8)):
        for label, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                image = Image.new("L", (8, 8 + label), 100 * label)
                image.save(root / split / name / f"{i}.png")


def exchanged(root):
    """The two classes are taken for one another."""
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (root / "train" / old).rename(root / "train" / new)


def halved(root):
    for file in sorted((root / "train" / "a").iterdir())[::2]:
        file.unlink()


def other_tests(root):
    (root / "test" / "a" / "0.png").write_bytes(b"shorter")


CHANGES = [
    (exchanged, "train", "128 then, with other names, labels or sizes now"),
    (halved, "train", "128 then, 96 now"),
    (other_tests, "test", "16 then, with other names, labels or sizes now"),
]


@pytest.mark.parametrize(("change", "split", "told"), CHANGES)
def test_a_run_notices_that_its_images_have_changed(tmp_path, change, split, told):
    class_folders(tmp_path / "data")
    fields = {
        "data.name": "folder",
        "data.in_memory": False,
        "data.broken_images": "skip",
        "num_epochs": 1,
        "batch_size": 64,
    }
    config = tiny(**fields, **{"data.dir": str(tmp_path / "data")})
    job = train.build(config)
    state = train.create_train_state(job.config, job.model, job.tx)
    with checkpoints.open_checkpoints(tmp_path / "run") as manager:
        checkpoints.save(manager, 1, state, job.data.identity)
        checkpoints.wait(manager)
    before = everything(tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "moved")
    config.data.dir = str(tmp_path / "moved")

    def resume():
        identity = train.build(config).data.identity
        with checkpoints.open_checkpoints(tmp_path / "run") as manager:
            return checkpoints.restore(manager, state, Console(quiet=True), identity)

    resume()
    change(tmp_path / "moved")
    with pytest.raises(UserError) as error:
        resume()
    said = str(error.value)
    assert said.startswith(f"the images to {split} on have changed since the checkpoi")
    assert f"({told}): data.dir may move, but its content may not change" in said
    assert everything(tmp_path / "run") == before


# A workdir that is not what it was.


def test_a_workdir_that_is_moved_meanwhile_gets_no_second_one(
    overrides, tmp_path, monkeypatch
):
    def move(batch):
        while "11" not in names(tmp_path / "run"):
            time.sleep(0.01)
        (tmp_path / "run").rename(tmp_path / "moved")
        return batch

    with monkeypatch.context() as patch:
        at_step(patch, 15, move)
        with pytest.raises(UserError, match="no longer the one that this run began in"):
            train.train_and_evaluate(tiny(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert names(tmp_path / "moved") == {"11"}
    assert (tmp_path / "moved" / "owner.json").exists()


def test_links_in_the_place_of_drafts_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "file.draft").symlink_to(precious)
    files.replace_file(tmp_path / "file", "ours")
    assert precious.read_text() == "mine"
    assert (tmp_path / "file").read_text() == "ours"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_fifo_in_the_workdir_is_told(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is no ordinary file: move it away"):
        claim_workdir(tmp_path, tiny())


@pytest.mark.parametrize("listed", ["/dev/zero", "../../fifo", "fifo"])
def test_a_list_of_digests_leads_nowhere_else(three_saves, listed):
    with copied(three_saves) as workdir:
        step = workdir / "checkpoints" / "3"
        for place in (workdir, step):
            os.mkfifo(place / "fifo")
        entry = {listed: "0"}
        text = {"blake2b": entry, "of_this_list": digests._of_list(entry)}
        (step / "files.json").write_text(json.dumps(text))
        found, said = read(workdir)
        damaged = listed == "fifo"
        assert same_bits(found, leaves(small(2 if damaged else 3)))
        assert ("fifo is no ordinary file" in said) == damaged


@pytest.mark.parametrize(
    "text", ["[" * 99999, "[]", '{"blake2b": [], "of_this_list": 3}', "\0"]
)
def test_a_list_of_digests_that_is_none_proves_nothing(three_saves, text):
    with copied(three_saves) as workdir:
        (workdir / "checkpoints" / "3" / "files.json").write_text(text)
        found, said = read(workdir)
        assert same_bits(found, leaves(small(3)))
        assert said == ""


@pytest.mark.parametrize("digest", [{}, [], 3, {"blake2b": 3}])
def test_a_digest_that_is_none_is_damage(three_saves, digest):
    with copied(three_saves) as workdir:
        step = workdir / "checkpoints" / "3"
        (step / "files.json").unlink()
        (step / "digest" / "metadata").write_text(json.dumps(digest))
        found, said = read(workdir)
        assert same_bits(found, leaves(small(2)))
        assert "is damaged" in said


def test_a_run_without_any_row_of_tests_has_a_report(undisturbed, overrides, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    rows = [{"step": 11, "test_accuracy": 0.5}, {"step": 11, "skipped_images": 1e999}]
    (tmp_path / monitor.METRICS).write_text("\n".join(map(json.dumps, rows)))
    train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert (tmp_path / "course.png").exists()


# The command, before there is a run.


COMMANDS = [  # more arguments, variables, the sentence
    (["--processes=2"], {}, "--processes and --process need --coordinator=host:port"),
    (["--coordinator=junk"], {}, "--coordinator is host:port, got 'junk'"),
    (["--coordinator=a:1"], {}, "--coordinator needs --processes, 1 or more, and --pr"),
    (
        ["--coordinator=a:1", "--processes=2", "--process=5"],
        {},
        "from 0 to one less, got 2 and 5",
    ),
    ([], {"JAX_PLATFORMS": "junk"}, "JAX finds no device ("),
    ([], {"JAX_ENABLE_X64": "junk"}, "error: ValueError: invalid truth value 'junk'"),
]


@pytest.mark.parametrize(("arguments", "variables", "sentence"), COMMANDS)
def test_a_command_that_cannot_begin_ends_in_one_line(
    tmp_path, arguments, variables, sentence
):
    run = start(
        [*command(tmp_path / "run"), *arguments],
        capture_output=True,
        env={**os.environ, **variables},
    )
    assert run.returncode == 1
    assert sentence in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


SLOW = """
import signal, sys, time
import beginning
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
beginning.tell()
print("here", flush=True)
time.sleep(600)
"""


def test_ctrl_c_is_told_while_modules_are_imported():
    experiments = pathlib.Path(train.__file__).parent
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(experiments)},
    )
    with run:
        assert run.stdout.readline() == "here\n"
        run.send_signal(signal.SIGINT)
        told = run.stderr.read()
    assert run.returncode == 130
    assert told == "\nstopped at once: the same command goes on from the last save\n"


def test_what_is_not_installed_is_told_in_a_line():
    code = "import sys; sys.modules['flax'] = None; import beginning; beginning.tell()"
    experiments = pathlib.Path(train.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; import flax"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(experiments)},
    )
    assert "pip install -e '.[experiments]' installs what" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_worker_that_is_stuck_keeps_no_run_that_is_stopped(tmp_path):
    class_folders(tmp_path / "data")
    fields = {
        "data.name": "folder",
        "data.in_memory": False,
        "data.workers": 2,
        "data.dir": tmp_path / "data",
        "num_epochs": 9999,
        "log_every_steps": 1,
        "checkpoint_every_epochs": 9999.0,
        "eval_every_epochs": 9999,
    }
    workdir = tmp_path / "run"
    run = subprocess.Popen(
        command(workdir, **fields), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with run:
        while run.poll() is None and not monitor.read_metrics(workdir):
            time.sleep(0.1)
        listed = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
        for child in listed.split():
            os.kill(int(child), signal.SIGSTOP)  # as one whose disk does not answer
        try:
            time.sleep(1)
            run.send_signal(signal.SIGTERM)
            output, _ = run.communicate(timeout=60)
        finally:
            for child in listed.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
    assert run.returncode == 0
    assert b"asked to stop: saved after step" in output


def test_default_workdirs_are_one_folder_each():
    def named(**fields):
        return train.default_workdir("experiments/digits_st3.py", fields)

    assert named() == pathlib.Path("runs/digits_st3")
    assert named(seed=3).name == "digits_st3-seed=3"
    layers = [named(x=(("head/*", 0.5),)), named(x=(("head/**", 0.5),)), named(x="a/b")]
    assert len({*layers}) == 3
    for path in (*layers, named(x="y" * 999)):
        assert path.parent == pathlib.Path("runs")
        assert len(path.name) < 200
        assert not set(path.name) & set("*/'\" ()")
