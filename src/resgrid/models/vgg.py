"""VGG-16 for CIFAR: configuration D of Simonyan & Zisserman 2014 (arXiv 1409.1556), BN and dropout added.

As the first original's companion built it in Keras: each convolution has a bias and is followed by ReLU and
then BN, in that order; one dense layer of 512 instead of two of 4096. Batch norm: epsilon 1e-3, and Keras's
momentum of 0.99, which is 0.01 in PyTorch.

Parameters with 10 classes: 15,001,418, of which 14,991,946 are trainable and 9,472 are moving means and
variances.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from resgrid.errors import ResgridError
from resgrid.models.convolution import Conv3x3
from resgrid.models.dropout import Dropout

FILTERS = (64, 128, 256, 512, 512)  # of a block's convolutions; a 2x2 max-pooling ends each block


def build(
    blocks: tuple[int, ...], num_classes: int, dropout: float | tuple[float, float, float]
) -> tuple[nn.Module, nn.Module]:
    """Base, images (N, 3, 32, 32) to (N, 512), and head, from there to logits (N, num_classes).

    `blocks`: convolutions a block. `dropout`: after the first convolution, after the others that do not end a
    block, around the dense layer; one rate stands for all three.
    """
    first, others, dense = dropout if isinstance(dropout, tuple) else (dropout, dropout, dropout)
    base: OrderedDict[str, nn.Module] = OrderedDict()
    in_channels = 3
    for block, (convolutions, channels) in enumerate(zip(blocks, FILTERS, strict=True), start=1):
        for index in range(1, convolutions + 1):
            rate = first if in_channels == 3 else others if index < convolutions else 0.0
            base[f"conv{block}_{index}"] = _convolution(in_channels, channels, rate)
            in_channels = channels
        base[f"pool{block}"] = nn.MaxPool2d(2)  # (N, channels, 32 / 2^block, 32 / 2^block)
    base["flatten"] = nn.Flatten()  # (N, 512)

    head = OrderedDict(
        dropout1=Dropout(dense),
        dense=nn.Linear(512, 512),
        relu=nn.ReLU(inplace=True),
        norm=nn.BatchNorm1d(512, eps=1e-3, momentum=0.01),
        dropout2=Dropout(dense),
        classifier=nn.Linear(512, num_classes),
    )
    return nn.Sequential(base), nn.Sequential(head)


def _convolution(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    layers = OrderedDict(
        conv=Conv3x3(in_channels, out_channels),
        relu=nn.ReLU(inplace=True),
        norm=nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01),
    )
    if dropout:
        layers["dropout"] = Dropout(dropout)
    return nn.Sequential(layers)


def imagenet_vgg16_base(model: nn.Module) -> None:
    """Give the 13 convolutions of `model.base` torchvision's ImageNet weights (a download of 528 MB).

    The batch norms, which torchvision's network has not, are left alone: as built and in inference mode
    they only divide by sqrt(1 + 1e-3). The weights want torchvision's input: channels normalised by the
    mean 0.485, 0.456, 0.406 and the deviation 0.229, 0.224, 0.225.

    Raises ResgridError where the file can neither be downloaded nor read.
    """
    from torchvision.models import VGG16_Weights  # 1.4 s, which only this function needs

    entry = VGG16_Weights.IMAGENET1K_V1
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / entry.url.rsplit("/", 1)[-1]
    try:
        weights = entry.get_state_dict(progress=True, map_location="cpu", weights_only=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ResgridError(
            f"{file}: torchvision's ImageNet weights cannot be downloaded or read: {_first_line(error)}. "
            f"Delete this file if it exists and try again with a network; or download {entry.url} elsewhere "
            f"and put it into {folder} (under $TORCH_HOME)."
        ) from None

    convolutions = [part for part in model.get_submodule("base").modules() if isinstance(part, nn.Conv2d)]
    try:
        names = [name.removesuffix(".weight") for name, tensor in weights.items() if tensor.ndim == 4]
        for convolution, name in zip(convolutions, names, strict=True):
            convolution.load_state_dict({key: weights[f"{name}.{key}"] for key in ("weight", "bias")})
    except (AttributeError, KeyError, ValueError, RuntimeError):
        raise ResgridError(
            f"{file}: these are not the weights of torchvision's VGG-16. Delete the file and try again."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
