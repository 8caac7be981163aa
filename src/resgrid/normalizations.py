"""Means and deviations that images are normalised with elsewhere, on the 0-1 scale, by the name to give them.

Apart from `config.py` because `resgrid --help` names them and imports no pydantic.
"""

from __future__ import annotations

_Triple = tuple[float, float, float]

NORMALIZATIONS: dict[str, tuple[_Triple, _Triple]] = {
    "keras": ((120.7076 / 255,) * 3, (64.1501 / 255,) * 3),  # the Keras original of the CIFAR ResNets
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # kuangliu/pytorch-cifar
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # the deviation over all pixels
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's
    "half": ((0.5,) * 3, (0.5,) * 3),  # from -1 to 1
    "none": ((0.0,) * 3, (1.0,) * 3),  # from 0 to 1
}
