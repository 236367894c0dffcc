"""How fast 2:4 layers are on an NVIDIA GPU, next to dense ones, in PyTorch.

python experiments/benchmarks/two_four.py

Needs PyTorch alone, and takes under a minute. A row is a layer, or an MLP of two, of
a size that vision or language models have, with random weights of which two of every
four are zero: dense, and as PyTorch's two libraries run it, by their default algorithm
and, for cuSPARSELt, by the one that its search finds. Each is called from Python, as a
model without ``torch.compile`` calls it, and then replayed as a CUDA graph, where time
is the GPU's alone. Dense and sparse take turns, and every call takes other weights, so
that no cache holds them. A library that fails says so in its row, and the next goes
on. ``--seconds=120`` gives more time to a slow GPU.
"""

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

BACKENDS = ("CUTLASS", "cuSPARSELt")
COLUMNS = (
    *("layer", "outputs x inputs", "tokens", "dtype", "library", "called"),
    *("dense, us", "2:4, us", "times faster", "error"),
)
WAYS = ("from Python", "as a graph")
Kernels = list[torch.Tensor]


class Case(NamedTuple):
    """A layer to time.

    Attributes:
        name: What a reader knows it by.
        outputs: Rows of its weight, and columns of the second one of an MLP.
        inputs: Columns of its weight.
        tokens: Rows of its input.
        is_mlp: Whether GELU and a layer back to ``inputs`` follow.
    """

    name: str
    outputs: int
    inputs: int
    tokens: int
    is_mlp: bool = False

    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each weight."""
        up = (self.outputs, self.inputs)
        return [up, up[::-1]] if self.is_mlp else [up]


BATCH = 64 * 197  # tokens of 64 images of a ViT with patches of 16
CASES = [
    Case("ViT-B MLP", 3072, 768, BATCH, is_mlp=True),
    Case("ViT-L MLP", 4096, 1024, BATCH, is_mlp=True),
    Case("7B MLP", 11008, 4096, 4096, is_mlp=True),
    Case("7B MLP", 11008, 4096, 16, is_mlp=True),
    Case("ViT-B MLP", 3072, 768, 197, is_mlp=True),
    Case("ViT-B up", 3072, 768, BATCH),
    Case("ViT-L up", 4096, 1024, BATCH),
    Case("ViT-L down", 1024, 4096, BATCH),
    Case("ViT-L up", 4096, 1024, 197),
    Case("7B attention", 4096, 4096, 4096),
    Case("7B up", 11008, 4096, 4096),
    Case("7B down", 4096, 11008, 4096),
    Case("7B up", 11008, 4096, 16),
    Case("70B up", 28672, 8192, 4096),
    Case("70B up", 28672, 8192, 16),
]


def two_four(weight: torch.Tensor) -> torch.Tensor:
    """A weight with zeros in two of every four inputs, drawn for each four."""
    places = list(itertools.combinations(range(4), 2))
    kept = torch.tensor([[i in pair for i in range(4)] for pair in places])
    groups = weight.reshape(-1, 4)
    drawn = torch.randint(len(places), (len(groups),), device=weight.device)
    return (groups * kept.to(weight)[drawn]).reshape(weight.shape)


def compressed(weight: torch.Tensor, backend: str, x: torch.Tensor) -> torch.Tensor:
    """A weight as a library runs it; with "best", as it is fastest for inputs ``x``."""
    sparse: Any = torch.sparse
    if backend == "CUTLASS":
        return sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
    algorithm = 0
    if backend.endswith("best"):
        packed = torch._cslt_compress(weight)
        padded = functional.pad(x, (0, 0, 0, -len(x) % 8))  # as PyTorch does
        algorithm = torch._cslt_sparse_mm_search(packed, padded.t())
    return sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight, algorithm)


def forward(x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """A layer, or two with GELU between them."""
    x = functional.linear(x, kernels[0])
    for kernel in kernels[1:]:
        x = functional.linear(functional.gelu(x), kernel)
    return x


def row(case: Case, dtype: torch.dtype, backend: str, way: str, device: str) -> str:
    """Times a layer dense and sparse: a row of the table, or what went wrong."""
    named = [case.name, f"{case.outputs} x {case.inputs}", f"{case.tokens}"]
    named += [str(dtype).removeprefix("torch."), backend, way]
    try:
        dense, sparse, error = timed(case, dtype, backend, way, device)
    except Exception as failure:  # of a library: the next rows are still of use
        reason = str(failure).strip().splitlines() or [""]
        what = f"{type(failure).__name__}: {reason[0][:100]}".replace("|", "/")
        return line([*named, "", "", "", what])
    times = [f"{1e6 * dense:.1f}", f"{1e6 * sparse:.1f}", f"{dense / sparse:.2f}"]
    return line([*named, *times, f"{error:.1e}"])


def timed(
    case: Case, dtype: torch.dtype, backend: str, way: str, device: str
) -> tuple[float, float, float]:
    """Seconds of a call, dense and sparse, and the relative error of the sparse one."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return x / math.sqrt(shape[-1])

    x = drawn(case.tokens, case.inputs)
    hidden = drawn(case.tokens, case.outputs)
    size = 2 * case.outputs * case.inputs * len(case.shapes())  # bytes
    copies = min(64, math.ceil(4 * cache(device) / size))
    dense = [[two_four(drawn(*s)) for s in case.shapes()] for _ in range(copies)]
    sparse = [
        [compressed(w, backend, i) for w, i in zip(kernels, (x, hidden), strict=False)]
        for kernels in dense
    ]
    exact, found = forward(x, dense[0]), forward(x, sparse[0])
    error = float((found - exact).abs().max() / exact.abs().max())
    runs = [each(x, layers, way) for layers in (dense, sparse)]
    of_dense, of_sparse = in_turn(runs, device)
    return of_dense / copies, of_sparse / copies, error


def cache(device: str) -> int:
    """Bytes of the second-level cache."""
    if device == "cpu":
        return 1
    properties = torch.cuda.get_device_properties(0)
    return getattr(properties, "L2_cache_size", 0) or 50_000_000


def each(x: torch.Tensor, layers: list[Kernels], way: str) -> Callable[[], Any]:
    """A function that calls every layer once."""

    def run() -> None:
        for kernels in layers:
            forward(x, kernels)

    if way == "from Python":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def in_turn(runs: list[Callable[[], Any]], device: str) -> list[float]:
    """Seconds of each, the median of ten turns of some milliseconds."""
    calls = 1
    for run in runs:
        run()
        calls = max(calls, math.ceil(2e-3 / seconds(run, 1, device)))
    turns = [[seconds(run, min(calls, 50), device) for run in runs] for _ in range(10)]
    return [statistics.median(each) for each in zip(*turns, strict=True)]


def seconds(run: Callable[[], Any], calls: int, device: str) -> float:
    """Of one of so many calls, by the clock of the device."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    for _ in range(calls):
        run()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 1e3 / calls


def rows(backend: str, device: str, end: float) -> Iterator[str]:
    """The rows of one library, until the clock is at ``end``."""
    libraries = [backend] + [f"{backend}, best"] * (backend == "cuSPARSELt")
    dtypes = (torch.bfloat16, torch.float16)
    for way, dtype in itertools.product(WAYS, dtypes):
        for case, library in itertools.product(CASES, libraries):
            if dtype == torch.float16 and case.name != "ViT-L MLP":
                continue  # it is as fast as bfloat16
            if time.perf_counter() > end:
                yield f"{backend}: out of time, more with --seconds=..."
                return
            yield row(case, dtype, library, way, device)
            if device != "cpu":
                torch.cuda.empty_cache()


def line(cells: list[str]) -> str:
    """A row of Markdown."""
    return f"| {' | '.join(cells)} |"


def about() -> str:
    """What the figures are of."""
    properties = torch.cuda.get_device_properties(0)
    library = torch.backends.cusparselt.version()
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}; "
        f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuSPARSELt {library}"
    )


def main() -> None:
    """Times both libraries, each in a process that may end as it likes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--backend", choices=BACKENDS, help="this one alone")
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no NVIDIA GPU that PyTorch can use: there is nothing to time")
    if settings.backend:
        end = time.perf_counter() + settings.seconds
        with torch.inference_mode():
            for text in rows(settings.backend, "cuda", end):
                print(text, flush=True)
        return
    print(
        f"{about()}\n\n{line([*COLUMNS])}\n{line(['---'] * len(COLUMNS))}", flush=True
    )
    begin = time.perf_counter()
    for after, backend in enumerate(BACKENDS):
        left = settings.seconds - (time.perf_counter() - begin)
        share = left / (len(BACKENDS) - after)
        command = [sys.executable, "-W", "ignore", __file__, f"--backend={backend}"]
        try:
            run = subprocess.run([*command, f"--seconds={share}"], timeout=share + 30)
            if run.returncode:
                print(f"{backend}: its process ended with {run.returncode}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{backend}: stopped, as it hung", flush=True)


if __name__ == "__main__":
    main()
