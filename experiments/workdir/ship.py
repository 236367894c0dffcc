"""What a run ends with: the tested network, in files to ship."""

import json
import pathlib
from typing import Any

import flax
import jax
import numpy as np
from rich.markup import escape
from safetensors import numpy as safetensors

import st3jax
from job.build import Job
from workdir.claim import FREE
from workdir.files import draft_of, writing
from workdir.surroundings import versions

__all__ = ["write_networks"]

NETWORKS = {"model": "test", "model_ema": "ema_test"}
"""From the name of files to what the evaluation calls the network."""


def write_networks(
    workdir: pathlib.Path,
    job: Job,
    networks: dict[str, Any],
    tests: dict[str, float],
) -> list[str]:
    """Leaves ``model.st3``, compact, and ``model.safetensors``, dense, in the workdir.

    A run with moving averages leaves ``model_ema.st3`` and ``model_ema.safetensors``,
    too. Equal networks make equal bytes.

    Args:
        workdir: Where to write.
        job: What was trained.
        networks: The variables that were tested, on the host, by the names of the
            evaluation.
        tests: What came out.

    Returns:
        Where the networks are and how large, a sentence for each, to be printed.

    Raises:
        UserError: If they cannot be written.
    """
    if jax.process_index() > 0:  # whose folder nobody reads
        return []
    layout = {f"params/{path}": letters for path, letters in job.layouts.items()}
    told = []
    for name, network in NETWORKS.items():
        if network not in networks:
            continue
        variables = networks[network]
        metadata = _metadata(job, variables["params"], tests[f"{network}_accuracy"])
        compact, dense = workdir / f"{name}.st3", workdir / f"{name}.safetensors"
        contents = _safetensors(variables, metadata)
        with writing(workdir):
            size = st3jax.save_sparse(
                compact, variables, metadata=metadata, layout=layout
            )
            with draft_of(dense) as draft:
                draft.write_bytes(contents)
        what = "the moving average" if network == "ema_test" else "the network"
        told.append(
            f"{what} to ship: {escape(str(compact))}, {size:,} bytes, "
            f"[bold]{len(contents) / size:.1f}[/] times smaller than dense "
            f"({dense.name}, {len(contents):,})"
        )
    return told


def _metadata(job: Job, params: Any, accuracy: float) -> dict[str, Any]:
    """What a file says of its network: enough to make it again."""
    config, summary = job.config, st3jax.summary(params)
    settings = json.loads(config.to_json_best_effort(), parse_constant=str)
    for field in FREE:  # of this machine
        section, name = field.split(".")
        del settings[section][name]
    return {
        "network": config.model.name,
        "num_classes": job.data.num_classes,
        "image_size": config.data.image_size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "method": config.sparsity.method,
        "sparsity": int(summary.zeros) / summary.weights,
        "test_accuracy": accuracy,
        "config": settings,
        "versions": versions(),
    }


def _safetensors(variables: Any, metadata: dict[str, Any]) -> bytes:
    """The dense arrays by their names, joined by dots."""
    flat = flax.traverse_util.flatten_dict(variables, sep=".")
    arrays = {name: np.asarray(x, order="C") for name, x in flat.items()}
    # Several entries would come in another order each time.
    return safetensors.save(arrays, {"st3jax": json.dumps(metadata)})
