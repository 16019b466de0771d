"""Image-classification training on PyTorch and Hugging Face Accelerate.

From Python, use `lab.load_model` and `lab.predict` (`lab/inference.py`) and, in a checkout,
`train.main(["--dataset", "digits"])`. Errors that the caller can fix raise `lab.errors.UserError`.
Importing `lab` does not import PyTorch.
"""

__version__ = "0.1.0"
__all__ = ["Prediction", "load_model", "predict"]

TYPE_CHECKING = False  # type checkers know the name; importing `typing` takes time
if TYPE_CHECKING:
    from lab.inference import Prediction, load_model, predict


def __getattr__(name: str) -> object:
    """Return a name of `lab.inference`, which is imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("lab.inference"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
