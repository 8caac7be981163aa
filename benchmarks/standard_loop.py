"""The training loop that everybody copies: PIL images in DataLoader workers, torchvision's transforms, fp32.

As in the two most copied public CIFAR-10 scripts: two workers, random crop and flip, ToTensor and Normalize,
NCHW, eager, and two `.item()` a step. The network is ResGrid's own, so that the loops alone are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Images(Dataset):
    """As torchvision.datasets.CIFAR10: an array in memory, a PIL image for each access."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def loaders(images: np.ndarray, labels: np.ndarray, batch_size: int, device: torch.device):
    """For training and for testing, over the same uint8 images (N, 32, 32, 3)."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augmented = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *to_tensor]
    )
    more = {"num_workers": 2, "pin_memory": device.type == "cuda", "persistent_workers": True}
    train = DataLoader(
        Images(images, labels, augmented), batch_size, shuffle=True, drop_last=True, **more
    )  # fmt: skip
    test = DataLoader(Images(images, labels, transforms.Compose(to_tensor)), 100, drop_last=True, **more)
    return train, test


def train(model: nn.Module, loader, optimizer, device: torch.device) -> Iterator[int]:
    """Images done, after each step of one epoch."""
    criterion = nn.CrossEntropyLoss()
    model.train()
    train_loss, correct, total = 0.0, 0, 0
    for inputs, targets in loader:
        inputs, targets = inputs.to(device), targets.to(device)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        train_loss += loss.item()
        _, predicted = outputs.max(1)
        total += targets.size(0)
        correct += predicted.eq(targets).sum().item()
        yield total


def test(model: nn.Module, loader, device: torch.device) -> Iterator[int]:
    """Images done, after each batch."""
    criterion = nn.CrossEntropyLoss()
    model.eval()
    test_loss, correct, total = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            outputs = model(inputs)
            loss = criterion(outputs, targets)
            test_loss += loss.item()
            _, predicted = outputs.max(1)
            total += targets.size(0)
            correct += predicted.eq(targets).sum().item()
            yield total
