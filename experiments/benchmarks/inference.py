"""What zeros are worth at inference: milliseconds of sparse and dense engines.

pip install -e '.[benchmarks]'
python experiments/benchmarks/inference.py --quick
python experiments/benchmarks/inference.py

Networks have random weights, pruned by ``st3jax.prune`` and exported as ONNX. MNN runs
them with its sparse kernels; the yardstick are ONNX Runtime, OpenVINO and MNN on the
dense network. All that is compared takes turns in one process. Rows are appended to
``--results``/inference.csv after each group of them; what is there is not run again. A
busy machine spoils wall time and leaves the CPU time of one thread fair: look at the
least of many runs.
"""

import csv
import itertools
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from absl import flags
from engines import ENGINES, Run, convert_for_mnn
from harness import run_main
from inference_networks import DISTRIBUTIONS, NETWORKS, pruned, random_network
from inference_tables import Group, overview, table

import st3jax
from shipping.network import Network
from shipping.onnx_writer import to_onnx
from workdir.files import draft_of

RESULTS = flags.DEFINE_string("results", "runs/inference", "Where rows and files go.")
QUICK = flags.DEFINE_bool("quick", False, "MobileNetV1, two settings, one thread.")
CHOSEN = flags.DEFINE_list("networks", list(NETWORKS), "Which networks.")
WAYS = flags.DEFINE_list("distributions", list(DISTRIBUTIONS), "Which zeros.")
SPARSITIES = flags.DEFINE_list("sparsities", ["0.8", "0.9", "0.95", "0.98"], "Of them.")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Images at once.")
THREADS = flags.DEFINE_list("threads", ["1", "2"], "Threads of an engine.")
CHOSEN_ENGINES = flags.DEFINE_list("engines", list(ENGINES), "Which run it dense.")
SECONDS = flags.DEFINE_float("seconds", 20.0, "Time for each group of rows.", 0)

IN_A_ROW = 3  # runs of an engine before the next has its turn
LEAST_ROUNDS = 3
FIELDS = (
    "processor", "network", "batch", "threads", "distribution", "sparsity", "engine",
    "file_mb", "cpu_ms", "cpu_ms_median", "wall_ms", "wall_ms_median", "runs",
)  # fmt: skip


class Timed(NamedTuple):
    """Something to run, and how long each run took.

    Attributes:
        engine: Its name.
        sparsity: Share of zeros, or 0.
        file: What it has loaded.
        run: Runs it; None if a layer has no weights left.
        cpu: Milliseconds of all threads together.
        wall: Milliseconds on the clock.
    """

    engine: str
    sparsity: float
    file: pathlib.Path
    run: Run | None
    cpu: list[float]
    wall: list[float]


def processor() -> str:
    """The name of the processor, and how wide its vectors are."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in said.items()}
    flags_of = told.get("flags", "").split()
    wide = "AVX-512" if "avx512f" in flags_of else "AVX2" if "avx2" in flags_of else ""
    family = f"family {told.get('cpu family')} model {told.get('model')}"
    held = os.environ.get("ONEDNN_MAX_CPU_ISA")  # which OpenVINO obeys
    said_of_it = f", oneDNN held to {held}" if held else ""
    return f"{told.get('model name', 'unknown')} {family} {wide}".strip() + said_of_it


def dense_files(network: Network) -> tuple[pathlib.Path, pathlib.Path]:
    """A dense network's files of ONNX and of MNN; made if they are missing."""
    path = pathlib.Path(RESULTS.value, f"{network.name}.onnx")
    mnn = path.with_suffix(".mnn")
    if not path.exists():
        with draft_of(path) as draft:
            onnx.save(to_onnx(network), draft)
    if not mnn.exists():
        convert_for_mnn(path, mnn)
    return path, mnn


def sparse_file(network: Network, distribution: str, sparsity: float) -> pathlib.Path:
    """A pruned network's file of MNN, which agrees with ONNX Runtime; made if missing.

    It is empty if a layer has no weights left, and the network gives nothing.

    Raises:
        RuntimeError: If it does not agree.
    """
    name = f"{network.name}-{distribution}-{sparsity:g}"
    path = pathlib.Path(RESULTS.value, f"{name}.mnn")
    if not path.exists():
        sparse = pruned(network, sparsity, distribution)
        if st3jax.summary(sparse.variables["params"]).vanished():
            path.touch()
            return path
        source = path.with_suffix(".onnx")
        onnx.save(to_onnx(sparse), source)
        with draft_of(path) as draft:
            convert_for_mnn(source, draft)
            expected = ENGINES["ONNX Runtime"](source, network.images, 1)
            found = ENGINES["MNN"](draft, network.images, 1)
            check(name, found(network.images), expected(network.images))
        source.unlink()
    return path


def check(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Two engines agree.

    Raises:
        RuntimeError: If they do not.
    """
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error <= 1e-5:
        raise RuntimeError(f"the logits of {name} are {error:.1e} off")


def prepared(group: Group) -> tuple[list[Timed], np.ndarray]:
    """What takes turns: three engines on the dense network, MNN on each sparse one."""
    network = random_network(group.network)
    dense, dense_mnn = dense_files(network)
    shape = (group.batch, *network.images.shape[1:])
    images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    files = [
        (name, 0.0, dense_mnn if name == "MNN" else dense)
        for name in CHOSEN_ENGINES.value
    ]
    for sparsity in map(float, SPARSITIES.value):
        path = sparse_file(network, group.distribution, sparsity)
        files.append(("MNN", sparsity, path))
    timed = []
    for engine, sparsity, file in files:
        whole = file.stat().st_size > 0
        run = ENGINES[engine](file, images, group.threads) if whole else None
        timed.append(Timed(engine, sparsity, file, run, [], []))
    results = [each.run(images) for each in timed if each.run and not each.sparsity]
    for result in results:
        check(f"an engine on {dense}", result, results[0])
    return timed, images


def measure(timed: list[Timed], images: np.ndarray) -> None:
    """Runs each in turn, again and again."""
    started, rounds = time.monotonic(), 0
    while rounds < LEAST_ROUNDS or time.monotonic() - started < SECONDS.value:
        rounds += 1
        for each in timed:
            if each.run is None:
                continue
            for _ in range(IN_A_ROW):
                wall, cpu = time.perf_counter(), time.process_time()
                each.run(images)
                each.cpu.append(1e3 * (time.process_time() - cpu))
                each.wall.append(1e3 * (time.perf_counter() - wall))


def rows_of(group: Group, timed: list[Timed]) -> Iterator[dict[str, Any]]:
    """The rows of a group."""
    for each in timed:
        times = {"cpu_ms": each.cpu, "wall_ms": each.wall}
        yield {
            "processor": processor(),
            **group._asdict(),
            "sparsity": each.sparsity,
            "engine": each.engine,
            "file_mb": f"{each.file.stat().st_size / 1e6:.2f}",
            **{k: f"{min(ms, default=np.nan):.2f}" for k, ms in times.items()},
            **{
                f"{k}_median": f"{np.median(ms or np.nan):.2f}"
                for k, ms in times.items()
            },
            "runs": len(each.cpu),
        }


def _median(times: list[float]) -> str:
    return f"{np.median(times or [np.nan]):.2f}"


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_there(path: pathlib.Path, group: Group) -> list[dict[str, Any]]:
    """The rows of a group, if this processor has measured all that are asked for."""
    wanted = {0.0, *map(float, SPARSITIES.value)}
    rows = [
        row
        for row in read_rows(path)
        if row["processor"] == processor()
        and all(row[key] == str(value) for key, value in group._asdict().items())
        and float(row["sparsity"]) in wanted
    ]
    return rows if {float(row["sparsity"]) for row in rows} == wanted else []


def append(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to the file."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def groups() -> Iterator[Group]:
    """What the flags choose."""
    if QUICK.value:
        yield Group("MobileNetV1", "global", 1, 1)
        yield Group("MobileNetV1", "uniform", 1, 1)
        return
    chosen = itertools.product(THREADS.value, BATCHES.value, CHOSEN.value, WAYS.value)
    for threads, batch, network, distribution in chosen:
        yield Group(network, distribution, int(batch), int(threads))


def main(argv: list[str]) -> None:
    """Measures what is missing, and prints all of it."""
    del argv
    path = pathlib.Path(RESULTS.value, "inference.csv")
    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {}
    for group in groups():
        rows = rows_there(path, group)
        if not rows:
            timed, images = prepared(group)
            measure(timed, images)
            rows = list(rows_of(group, timed))
            append(path, rows)
        measured[group] = rows
        print(table(group, rows), "\n", flush=True)
    print(overview(measured))


if __name__ == "__main__":
    run_main(main)
