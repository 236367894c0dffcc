"""What the exact threshold compiles to on an accelerator, without having one.

python experiments/benchmarks/selection_hlo.py
python experiments/benchmarks/selection_hlo.py --platform=cuda

The first needs ``pip install 'jax[tpu]'``, the second ``pip install 'jax[cuda12]'``.

Compiles the selection over ResNet-50's kernels ahead of time, for one described device
and for four that share the kernels, and reads the compiled HLO. Prints how many kernels
and how many reads of the weights a selection takes, near the threshold before (warm)
and far from it (cold), the memory, what crosses devices, and the time that follows from
the device's bandwidth and a launch of 4 microseconds a kernel on a GPU. Nothing is run:
all numbers are computed.
"""

import collections
import math
import os
import re
from typing import Any, NamedTuple

from harness import run_main

# No accelerator is asked for: only its compiler is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.resnet import imagenet_resnet
from st3jax.selection import quantile

PLATFORM = flags.DEFINE_enum("platform", "tpu", ["tpu", "cuda"], "To compile for.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the weights."
)
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BANDWIDTH = {"tpu": 0.82e12, "cuda": 3.35e12}  # of a v5e and of an H100, bytes a second
LAUNCH = {"tpu": 0.0, "cuda": 4e-6}  # seconds a kernel; a TPU's program launches once
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
TURNS = {  # of the loop and the branch, warm and cold; on one device or several
    ("tpu", True): ((4, 0), (9, 0)),
    ("tpu", False): ((4, 0), (9, 0)),
    ("cuda", True): ((0, 0), (0, 1)),
    ("cuda", False): ((9, 0), (9, 0)),
}
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"}
NO_KERNEL |= {"partition-id", "opt-barrier", "after-all", "call", "conditional"}
COLLECTIVE = re.compile("all-|reduce-scatter|collective|send|recv")


class Instruction(NamedTuple):
    """One line of HLO: its result's type, its operation, its operands, the rest."""

    shape: str
    opcode: str
    operands: list[str]
    rest: str


Program = dict[str, dict[str, Instruction]]  # computations, and what is in them


def described_devices() -> Any:
    """Four devices of which only a description is there."""
    if PLATFORM.value == "tpu":
        options: dict[str, Any] = {"topology_name": "v5e:2x2"}
    else:
        options = {"topology": "1x1x4", "target_config": H100}
    return topologies.get_topology_desc(platform=PLATFORM.value, **options).devices


def kernels(devices: Any) -> list[jax.ShapeDtypeStruct]:
    """ResNet-50's kernels, their last axis shared by all devices where it divides."""
    model = imagenet_resnet(50, 1000)
    variables = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), train=False),
        jax.random.key(0),
    )
    mesh = Mesh(np.array(devices), ("i",))

    def placed(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        axes = [*[None] * (len(shape) - 1), None if shape[-1] % mesh.size else "i"]
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(DTYPE.value), sharding=sharding)

    leaves = jax.tree.leaves(variables["params"])
    return [placed(leaf.shape) for leaf in leaves if leaf.ndim > 1]


def parse(text: str) -> tuple[Program, str]:
    """The computations of an HLO text and the name of the first to run."""
    program: Program = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = head[2]
            entry = current if head[1] else entry
            program[current] = {}
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
            name, right = found.groups()
            # The type ends before the first operation that opens a bracket.
            split = re.match(r"(.*?[\]})]) ([a-z][\w\-]*)\((.*)$", right)
            if split and current:
                shape, opcode, rest = split.groups()
                operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                program[current][name] = Instruction(shape, opcode, operands, rest)
    return program, entry


def size(shape: str) -> int:
    """Bytes of an HLO type; those of a tuple are added up."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in found
    )


def work(program: Program, name: str, least: int) -> tuple[int, int]:
    """Kernels of a computation, and bytes of weights that they read."""
    count = read = 0
    here = program.get(name, {})
    for instruction in here.values():
        called = re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", instruction.rest)
        if instruction.opcode == "call" and called:
            inner = work(program, called[1], least)
            count, read = count + inner[0], read + inner[1]
        scalar = instruction.opcode != "fusion" and "[]" in instruction.shape
        done = instruction.opcode.endswith("-done")
        if instruction.opcode in NO_KERNEL or done or scalar:
            continue
        count += 1
        if not instruction.opcode.endswith("-start"):
            sizes = [size(here[o].shape) for o in set(instruction.operands) & set(here)]
            read += sum(n for n in sizes if n >= least)
    return count, read


def largest(program: Program, called: str) -> str:
    """The longest computation that is called in this way, or nothing."""
    lines = [i for computation in program.values() for i in computation.values()]
    found = [re.search(rf"{called}=%?([\w.\-]+)", i.rest) for i in lines]
    names = [match[1] for match in found if match]
    return max(names, key=lambda name: len(program[name]), default="")


def report(devices: Any) -> str:
    """A row of the table, for the weights spread over these devices."""
    leaves = kernels(devices)
    # This process has other devices than those it compiles for.
    quantile.are_whole = lambda: len(devices) == 1
    replicated = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
    near = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    select = jax.jit(lambda w, near: quantile.threshold(w, np.float32(0.9), near=near))
    traced = select.trace(leaves, near)
    compiled = traced.lower(lowering_platforms=(PLATFORM.value,)).compile()
    program, entry = parse(compiled.as_text())
    shards = [math.prod(w.sharding.shard_shape(w.shape)) for w in leaves]
    shards = [n * leaves[0].dtype.itemsize for n in shards]
    lines = [i for computation in program.values() for i in computation.values()]
    parts = [
        entry,
        *(largest(program, called) for called in ("body", "true_computation")),
    ]
    each = [work(program, part, min(shards)) for part in parts]
    moved = collections.Counter(
        size(i.shape)
        for i in lines
        if COLLECTIVE.match(i.opcode) and not i.opcode.endswith("-done")
    )
    memory = compiled.memory_analysis().temp_size_in_bytes / sum(shards)
    found = []
    for turns in TURNS[PLATFORM.value, len(devices) == 1]:
        times = list(zip((1, *turns), each, strict=True))
        count, read = (sum(n * one[i] for n, one in times) for i in (0, 1))
        launched, moving = (
            count * LAUNCH[PLATFORM.value],
            read / BANDWIDTH[PLATFORM.value],
        )
        found += [
            f"{count}",
            f"{read / sum(shards):.1f}",
            f"{1e3 * (launched + moving):.2f}",
        ]
    cells = [
        f"{len(devices)}",
        *found,
        f"{memory * leaves[0].dtype.itemsize:.2f}",
        f"{max(moved, default=0):,}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    """Compiles for one device and for four, and prints the table."""
    del argv
    devices = described_devices()
    print(f"compiled for {devices[0].device_kind}, {DTYPE.value}; nothing was run\n")
    print(
        "| devices | kernels, warm | reads | ms, computed | kernels, cold | reads "
        "| ms, computed | extra bytes a weight | largest message, bytes |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for count in (1, 4):
        print(report(devices[:count]), flush=True)


if __name__ == "__main__":
    run_main(main)
