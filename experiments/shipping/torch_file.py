"""A network as PyTorch's ``state_dict``: ``model.pt``, of tensors alone.

An ImageNet ResNet is what ``torchvision.models.resnet18`` to ``resnet152`` load
strictly. ``torch_networks.py``, which is copied beside it, has the other networks.
"""

import io
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import torch

from errors import UserError
from shipping import agreement, torch_networks
from shipping.network import Network
from shipping.torch_names import (
    Tensor,
    named_tensors,
    torchvision_depth,
    variables_of,
)

__all__ = ["FILE", "call", "export", "logits"]

FILE = "model.pt"
SOURCE = pathlib.Path(torch_networks.__file__)


def export(network: Network, folder: pathlib.Path) -> agreement.Exported:
    """Writes the tensors, and runs them in PyTorch if it is a network of this project.

    Of another network every array is read again, and has to have equal bits.

    Raises:
        UserError: If what was written is not the network, and nothing is in the folder
            then; or if torchvision is needed, and not installed.
    """
    tensors = named_tensors(network)
    ours = network.name in torch_networks.NETWORKS and not torchvision_depth(network)
    names = [FILE, SOURCE.name] if ours else [FILE]
    with agreement.draft_folder(folder, names) as draft:
        path = draft / FILE
        content = io.BytesIO()  # so that a full disk is an OSError
        torch.save({name: _to_torch(x.values) for name, x in tensors.items()}, content)
        path.write_bytes(content.getbuffer())
        weights = torch.load(path, weights_only=True)
        zeros = agreement.check_variables(FILE, _variables(weights, tensors), network)
        error, found = None, logits(network, weights)
        if found is not None:
            expected = agreement.expected_logits(network)
            error = agreement.check_logits("PyTorch", found, expected)
        if ours:
            (draft / SOURCE.name).write_text(SOURCE.read_text())
    paths, notes = [folder / name for name in names], (_who_takes_it(network),)
    return agreement.Exported(paths, zeros, error, notes, call(network, folder))


def _who_takes_it(network: Network) -> str:
    """Which network in PyTorch the tensors are for."""
    if depth := torchvision_depth(network):
        return f"torchvision.models.resnet{depth}(num_classes=...) loads it strictly"
    if network.name in torch_networks.NETWORKS:
        return f"NETWORKS[{network.name!r}] of {SOURCE.name} computes with it"
    return "its logits were not computed: this project has no such network in PyTorch"


def logits(network: Network, weights: dict[str, torch.Tensor]) -> np.ndarray | None:
    """What PyTorch computes of the network's images, if it has the network."""
    images = torch.tensor(network.images)
    if images.ndim == 4:
        images = images.permute(0, 3, 1, 2)
    with torch.inference_mode():
        if depth := torchvision_depth(network):
            return _torchvision(depth, weights)(images).numpy()
        if network.name not in torch_networks.NETWORKS:
            return None
        options = _options(network)
        return torch_networks.NETWORKS[network.name](weights, images, **options).numpy()


def call(network: Network, folder: pathlib.Path) -> str:
    """Lines that compute what ``logits`` does, where PyTorch has the network."""
    order = ".permute(0, 3, 1, 2)" if network.images.ndim == 4 else ""
    given = f"x = torch.tensor(images){order}"
    if depth := torchvision_depth(network):
        classes = network.variables["params"]["head"]["kernel"].shape[-1]
        return (
            "\nimport torchvision\n\n"
            f"{given}\n"
            f"model = torchvision.models.resnet{depth}(num_classes={classes})\n"
            "model.load_state_dict(weights)\n"
            "logits = model.eval()(x).detach().numpy()"
        )
    if network.name not in torch_networks.NETWORKS:
        return ""
    options = "".join(f", {key}={value}" for key, value in _options(network).items())
    return (
        f"\nimport sys\n\nsys.path.append({str(folder)!r})\n"
        f"from {SOURCE.stem} import NETWORKS\n\n{given}\n"
        f"logits = NETWORKS[{network.name!r}](weights, x{options}).numpy()"
    )


def _torchvision(depth: int, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Torchvision's network with these weights."""
    try:
        import torchvision
    except ImportError:
        raise UserError(
            "an ImageNet ResNet is checked by torchvision's, which is not installed: "
            "pip install torchvision"
        ) from None
    with torch.device("meta"):
        make = getattr(torchvision.models, f"resnet{depth}")
        model = make(num_classes=len(weights["fc.weight"]))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _options(network: Network) -> dict[str, Any]:
    """What the tensors do not say."""
    if network.name == "transformer":
        kernel = network.variables["blocks"]["attention"]["query"]["kernel"]
        return {"heads": kernel.shape[-2]}
    if network.name == "cifar_resnet":
        settings = network.metadata.get("config", {}).get("model", {})
        return {"stem_stride": settings.get("stem_stride") or 1}
    return {}


def _variables(
    weights: dict[str, torch.Tensor], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The network's variables, of what was read again."""
    return variables_of(
        {
            name: tensor._replace(values=_to_numpy(weights[name]))
            for name, tensor in tensors.items()
        }
    )


def _to_torch(values: np.ndarray) -> torch.Tensor:
    """A copy that is PyTorch's own; NumPy's bfloat16 is none that it knows."""
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of `_to_torch`."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
