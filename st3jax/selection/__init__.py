"""Which threshold leaves exactly this fraction? By counting, without a sort."""

from st3jax.selection.quantile import threshold

__all__ = ["threshold"]
