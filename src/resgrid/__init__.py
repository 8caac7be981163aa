"""ResGrid: architectures x optimizers on CIFAR-10 and on your own images.

`resgrid.load("examples/digits")` gives a pipeline's results in Python.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resgrid.results import Pipeline, load

__all__ = ["Pipeline", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The Python way in, imported when it is asked for: `resgrid --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resgrid import results

    return getattr(results, name)
