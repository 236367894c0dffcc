"""What a traced model does with its parameters, from one walk over its jaxpr."""

from st3jax.traced.axes import read_axes

__all__ = ["read_axes"]
