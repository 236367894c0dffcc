"""A network as ``model.safetensors``: names and tensors as in ``model.pt``.

Neither writing nor checking it needs PyTorch.
"""

import json
import pathlib

import safetensors.numpy

from shipping import agreement
from shipping.network import Network
from shipping.torch_names import named_tensors, variables_of

__all__ = ["FILE", "export"]

FILE = "model.safetensors"


def export(network: Network, folder: pathlib.Path) -> agreement.Exported:
    """Writes the tensors, reads them again, and compares every bit.

    Raises:
        UserError: If what was written is not the network; nothing is in the folder
            then.
    """
    tensors = named_tensors(network)
    with agreement.draft_folder(folder, [FILE]) as draft:
        content = safetensors.numpy.save(
            {name: tensor.values for name, tensor in tensors.items()},
            {"st3jax": json.dumps(network.metadata)},  # of several, the order varies
        )
        (draft / FILE).write_bytes(content)
        read = safetensors.numpy.load_file(draft / FILE)
        found = {name: x._replace(values=read[name]) for name, x in tensors.items()}
        zeros = agreement.check_variables(FILE, variables_of(found), network)
    return agreement.Exported([folder / FILE], zeros, None)
