"""ResGrid: architectures x optimizers on CIFAR-10 and on your own images.

`resgrid.load("examples/digits")` gives a pipeline's results in Python.
"""

from resgrid.results import Pipeline, load

__all__ = ["Pipeline", "__version__", "load"]
__version__ = "0.1.0"
