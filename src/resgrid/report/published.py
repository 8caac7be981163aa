"""Test accuracies that the two original experiments published for CIFAR-10, for the cells that have one.

The ResNets by depth: a later revision of the Keras system (165 epochs, the schedule of He et al.), which
left these rows blank at first. VGG-16: its companion table. ResNet-10: the PyTorch system's "about 91 %"
after 200 epochs.
"""

from __future__ import annotations

PUBLISHED_ACCURACY: dict[str, float] = {
    "resnet20-sgd": 0.9152,
    "resnet32-sgd": 0.9253,
    "resnet44-sgd": 0.9316,
    "resnet56-sgd": 0.9321,
    "resnet110-sgd": 0.9390,
    "resnet10-adam": 0.91,
    "vgg16-sgd": 0.9315,
}


def published_accuracy(source: str, architecture: str, optimizer: str) -> float | None:
    """The published figure of a grid cell (0-1), or None: there is none, or the data is not CIFAR-10."""
    return PUBLISHED_ACCURACY.get(f"{architecture}-{optimizer}") if source == "cifar10" else None
