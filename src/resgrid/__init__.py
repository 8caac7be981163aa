"""ResGrid: architectures x optimizers on CIFAR-10 and on your own images."""

__version__ = "0.1.0"
