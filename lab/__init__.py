"""Image-classification training on PyTorch and Hugging Face Accelerate.

From Python: `lab.train`, `lab.load_model`, `lab.predict`; see `lab/inference.py`. Their mistakes are
`lab.errors.UserError`. Importing `lab` imports no PyTorch.
"""

__version__ = "0.1.0"
__all__ = ["Prediction", "TrainedRun", "load_model", "predict", "train"]

TYPE_CHECKING = False  # as type checkers know it; `typing` is not imported for it
if TYPE_CHECKING:
    from lab.inference import Prediction, TrainedRun, load_model, predict, train


def __getattr__(name: str) -> object:
    """What `lab.inference` holds, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("lab.inference"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
