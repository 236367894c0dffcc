"""Full disks, damaged bits and runs that meet: what they leave of a training run.

python experiments/benchmarks/faults.py

Trains a short ``digits_st3.py`` undisturbed, and then

- ``--disks`` times where a disk gets full at some moment: every other time because it
  has no room for one more file, else for one more byte. The run has to end with one
  sentence, a status, and nothing that keeps the process alive; then the disk is made
  larger, and the same command has to end with the bits of the undisturbed run;
- with ``--flips`` single bits that flip in the files of the last checkpoint: the state
  that is read has to be that one or, told as damage, the one before;
- in ``--pairs`` of runs that are started at once in one workdir: one of them has to end
  with the bits of the undisturbed run, and the other one with a sentence.

Disks are file systems in memory, which need the right to mount. Everything is in
``runs/faults``, which is removed first. Prints a table in Markdown, and exits with
status 1 if anything hangs, differs or is lost.
"""

import io
import pathlib
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from harness import run_main
from rich.console import Console
from short_run import command, differences, environment, result, settings

from job.build import build
from job.steps import create_train_state
from workdir import checkpoints

DISKS = flags.DEFINE_integer("disks", 20, "How many disks get full.")
FLIPS = flags.DEFINE_integer("flips", 200, "How many bits flip.")
PAIRS = flags.DEFINE_integer("pairs", 20, "How many pairs of runs start at once.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of sizes, bits and moments.")

FOLDER = pathlib.Path("runs", "faults")
SECONDS = 180  # in which whatever does not hang has ended
LEAVING = 5  # seconds from the sentence to the end of the process


def start(workdir: pathlib.Path, **settings: Any) -> subprocess.Popen[str]:
    """A run, whose sentence can be waited for."""
    return subprocess.Popen(
        command(workdir, FOLDER / "data", **settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(FOLDER / "cache"),
    )


def end(run: subprocess.Popen[str], seconds: float = SECONDS) -> tuple[int | None, str]:
    """Status and last words of a run; None for the status of one that hangs."""
    try:
        return run.wait(seconds), run.communicate()[1]
    except subprocess.TimeoutExpired:
        run.kill()
        return None, run.communicate()[1]


def mount(disk: pathlib.Path, options: str) -> None:
    """A file system in memory, or other limits for the one that is there."""
    arguments = ["-t", "tmpfs", "-o", options, "st3jax", str(disk.resolve())]
    subprocess.run(["mount", *arguments], check=True)


def full_disks(expected: Any, rng: np.random.Generator) -> Iterator[str]:
    """What comes of runs on disks that get full."""
    disk = FOLDER / "disk"
    disk.mkdir()
    for number in range(DISKS.value):
        files, size = int(rng.integers(8, 80)), int(rng.integers(40, 900))
        limit = f"size=64m,nr_inodes={files}" if number % 2 else f"size={size}k"
        mount(disk, limit)
        try:
            yield full_disk(disk, limit, expected)
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def full_disk(disk: pathlib.Path, limit: str, expected: Any) -> str:
    """What comes of a run on one."""
    run = start(disk / "run")
    assert run.stderr
    told = run.stderr.readline()
    began = time.monotonic()
    status, more = end(run)
    seconds = time.monotonic() - began
    print(f"{limit}: {told.strip() or 'enough'} (then {seconds:.1f} s)", flush=True)
    if status == 0 and not told:
        return "the disk was large enough"
    if status is None or seconds > LEAVING:
        return "HUNG"
    if status != 1 or more or not told.startswith("error: "):
        return f"WRONG: status {status}, {told}{more}"
    mount(disk, "remount,size=256m,nr_inodes=0")
    status, told = end(start(disk / "run"))
    if status != 0 or differences(expected, disk / "run"):
        return f"LOST: status {status}, {told}"
    return "ended with a sentence, and went on to the same bits"


def flipped_bits(undisturbed: pathlib.Path, rng: np.random.Generator) -> Iterator[str]:
    """What is read of a checkpoint in which a bit flipped."""
    job = build(settings(FOLDER / "data"))
    like = create_train_state(job.config, job.model, job.tx)
    with checkpoints.open_checkpoints(undisturbed) as manager:
        *_, one_before, last = sorted(manager.all_steps())
        before, whole = (read(manager, step, like) for step in (one_before, last))
    for _ in range(FLIPS.value):
        workdir = FOLDER / "flipped"
        shutil.copytree(undisturbed / "checkpoints", workdir / "checkpoints")
        files = list((workdir / "checkpoints" / str(last)).rglob("*"))
        files = [x for x in files if x.is_file() and x.stat().st_size]
        sizes = np.array([x.stat().st_size for x in files])
        file = files[rng.choice(len(files), p=sizes / sizes.sum())]
        bits = bytearray(file.read_bytes())
        bits[int(rng.integers(len(bits)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bits)
        said = io.StringIO()
        with checkpoints.open_checkpoints(workdir) as manager:
            found = checkpoints.restore(manager, like, Console(file=said))
        told = "is damaged" in said.getvalue()
        if not same(found, before if told else whole):
            yield "WRONG BITS"
        else:
            yield "told, and the one before was taken" if told else "nothing was lost"
        shutil.rmtree(workdir)


def read(manager: Any, step: int, like: Any) -> Any:
    """The state of a checkpoint, of the structure of another."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    return manager.restore(step, args=args)["state"]


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def pairs(expected: Any, rng: np.random.Generator) -> Iterator[str]:
    """What comes of two runs that start at once in one workdir."""
    for number in range(PAIRS.value):
        workdir = FOLDER / f"pair{number}"
        runs = [start(workdir)]
        time.sleep(rng.uniform(0, 0.5) if number % 2 else 0)
        runs.append(start(workdir))
        ends = sorted((end(run) for run in runs), key=str)
        told = "".join(words for _, words in ends)
        if any(status is None for status, _ in ends):
            yield "HUNG"
        elif [status for status, _ in ends] != [0, 1] or "another run" not in told:
            yield f"WRONG: {ends}"
        elif differences(expected, workdir):
            yield "LOST"
        else:
            yield "one ended with the same bits, the other with a sentence"
        shutil.rmtree(workdir)


def main(argv: list[str]) -> None:
    """Disturbs runs, and prints what came of it."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to the runs
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    undisturbed = FOLDER / "undisturbed"
    status, told = end(start(undisturbed), seconds=10 * SECONDS)
    if status:
        sys.exit(told)
    expected = result(undisturbed)
    rng = np.random.default_rng(SEED.value)
    ends = {
        "full disk": Counter(full_disks(expected, rng)),
        "flipped bit": Counter(flipped_bits(undisturbed, rng)),
        "two runs at once": Counter(pairs(expected, rng)),
    }
    print("| fault | what came of it | times |\n|---|---|---|")
    for fault, counter in ends.items():
        for words, times in sorted(counter.items()):
            print(f"| {fault} | {words} | {times} |")
    sys.exit(any(words[:2].isupper() for counter in ends.values() for words in counter))


if __name__ == "__main__":
    run_main(main)
