"""What a run ran with, and on: to be told beside its numbers."""

import importlib.metadata
import os
import pathlib
import platform

import jax

import st3jax

__all__ = ["machine", "processor", "versions"]

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
    """Of Python, of this project and of what decides about numbers."""
    return {
        "Python": platform.python_version(),
        "st3jax": st3jax.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def machine() -> dict[str, str]:
    """The devices of all processes, and the host of this one; not its name."""
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": str(jax.process_count()),
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """Of the host: its model, and how many of its cores there are."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    model = names[0] if names else platform.processor() or "unknown"
    return f"{model}, {os.cpu_count()} cores"
