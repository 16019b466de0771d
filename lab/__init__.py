"""Image-classification training on PyTorch and Hugging Face Accelerate.

From Python: `lab.load_model` and `lab.predict`, see `lab/inference.py`; and, in a checkout,
`train.main(["--dataset", "digits"])`. Mistakes raise `lab.errors.UserError`. Importing `lab` does
not import PyTorch.
"""

__version__ = "0.1.0"
__all__ = ["Prediction", "load_model", "predict"]

TYPE_CHECKING = False  # as type checkers know it; `typing` is not imported for it
if TYPE_CHECKING:
    from lab.inference import Prediction, load_model, predict


def __getattr__(name: str) -> object:
    """What `lab.inference` holds, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("lab.inference"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
