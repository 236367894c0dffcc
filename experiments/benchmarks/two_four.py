"""How fast 2:4 layers are on an NVIDIA GPU, next to dense ones, in PyTorch.

python experiments/benchmarks/two_four.py

Needs PyTorch alone, and takes under a minute. A row is a layer, or an MLP of two, of
a size that vision or language models have, with random weights of which two of every
four are zero: dense, and as PyTorch's two libraries run it. CUTLASS is for compute
capability 8.x alone. cuSPARSELt runs by its default algorithm, as PyTorch's tensors
call it, and by the one that its search finds, where the result is either transposed by
PyTorch or by the product itself. Each is called from Python, as a model without
``torch.compile`` calls it, and then replayed as a CUDA graph, where time is the GPU's
alone. Dense and sparse take turns, and every call takes other weights, so that no cache
holds them. A library that fails says so in its row, and the next goes on.
``--seconds=120`` gives more time to a slow GPU.
"""

import argparse
import functools
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

BACKENDS = ("CUTLASS", "cuSPARSELt")
COLUMNS = (
    *("layer", "outputs x inputs", "tokens", "dtype", "library", "called"),
    *("dense, us", "2:4, us", "times faster", "error"),
)
SEARCHED, FUSED = "searched", "fused"
VARIANTS = (f"cuSPARSELt, {SEARCHED}", f"cuSPARSELt, {SEARCHED}, {FUSED}")
WAYS = ("from Python", "as a graph")
Tensors = list[torch.Tensor]
Layer = Callable[[torch.Tensor], torch.Tensor]


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


def sparse_layers(weights: Tensors, library: str, x: torch.Tensor) -> list[Layer]:
    """Layers of weights of one shape, as a library runs them, for inputs like ``x``."""
    sparse: Any = torch.sparse
    if library == "CUTLASS":
        tensors = map(sparse.SparseSemiStructuredTensorCUTLASS.from_dense, weights)
        return [functools.partial(functional.linear, weight=w) for w in tensors]
    if library == "cuSPARSELt":
        tensors = map(sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense, weights)
        return [functools.partial(functional.linear, weight=w) for w in tensors]
    fused = library.endswith(FUSED)
    packed = [torch._cslt_compress(weight) for weight in weights]
    algorithm = torch._cslt_sparse_mm_search(
        packed[0], padded(x).t(), transpose_result=fused
    )

    def layer(packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = torch._cslt_sparse_mm(
            packed, padded(x).t(), transpose_result=fused, alg_id=algorithm
        )
        return (y if fused else y.t())[: len(x)]

    return [functools.partial(layer, each) for each in packed]


def padded(x: torch.Tensor) -> torch.Tensor:
    """With as many rows as the library wants; PyTorch's own layers do the same."""
    return functional.pad(x, (0, 0, 0, -len(x) % 8)) if len(x) % 8 else x


def forward(x: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """A layer, or two with GELU between them."""
    x = layers[0](x)
    for layer in layers[1:]:
        x = layer(functional.gelu(x))
    return x


def row(case: Case, dtype: torch.dtype, library: str, way: str, device: str) -> str:
    """Times a layer dense and sparse: a row of the table, or what went wrong."""
    named = [case.name, f"{case.outputs} x {case.inputs}", f"{case.tokens}"]
    named += [str(dtype).removeprefix("torch."), library, way]
    try:
        dense, sparse, error = timed(case, dtype, library, way, device)
    except Exception as failure:  # of a library: the next rows are still of use
        reason = str(failure).strip().splitlines() or [""]
        what = f"{type(failure).__name__}: {reason[0][:100]}".replace("|", "/")
        return line([*named, "", "", "", what])
    times = [f"{1e6 * dense:.1f}", f"{1e6 * sparse:.1f}", f"{dense / sparse:.2f}"]
    return line([*named, *times, f"{error:.1e}"])


def timed(
    case: Case, dtype: torch.dtype, library: str, way: str, device: str
) -> tuple[float, float, float]:
    """Seconds of a call, dense and sparse, and the relative error of the sparse one."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return x / math.sqrt(shape[-1])

    size = 2 * case.outputs * case.inputs * len(case.shapes())  # bytes
    copies = min(64, math.ceil(4 * cache(device) / size))
    dense: list[list[Layer]] = []
    sparse: list[list[Layer]] = []
    x = y = drawn(case.tokens, case.inputs)
    for shape in case.shapes():
        if sparse:
            y = functional.gelu(sparse[-1][0](y))  # stored as it will be
        weights = [two_four(drawn(*shape)) for _ in range(copies)]
        dense.append([functools.partial(functional.linear, weight=w) for w in weights])
        sparse.append(sparse_layers(weights, library, y))
    networks = [[*zip(*layers, strict=True)] for layers in (dense, sparse)]
    exact, found = (forward(x, network[0]) for network in networks)
    error = float((found - exact).abs().max() / exact.abs().max())
    runs = [each(x, network, way) for network in networks]
    of_dense, of_sparse = in_turn(runs, device)
    return of_dense / copies, of_sparse / copies, error


def cache(device: str) -> int:
    """Bytes of the second-level cache."""
    if device == "cpu":
        return 1
    properties = torch.cuda.get_device_properties(0)
    return getattr(properties, "L2_cache_size", 0) or 50_000_000


def each(x: torch.Tensor, network: list[Any], way: str) -> Callable[[], Any]:
    """A function that calls every copy once."""

    def run() -> None:
        for layers in network:
            forward(x, layers)

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
    libraries = [backend, *VARIANTS] if backend == "cuSPARSELt" else [backend]
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
    major, _ = torch.cuda.get_device_capability()
    for after, backend in enumerate(BACKENDS):
        if backend == "CUTLASS" and major != 8:
            print(f"CUTLASS: for compute capability 8.x alone, not {major}.x")
            continue
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
