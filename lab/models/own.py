"""Models that are code of the user's: `--model FILE.py:FUNCTION`, and the argument of `train.main`.

Loading a file from a stranger must not run code (promise P4). Weights, checkpoints and settings
files can contain `FILE.py:FUNCTION`, so it is imported only by `register`, which scripts call with
what the user gave on the command line. `own_model` builds nothing else.
"""

import copy
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lab.config.schema import is_code
from lab.errors import UserError

ModelFunction = Callable[[int, int, int], nn.Module]  # of num_classes, in_chans and image_size


@dataclass(frozen=True)
class OwnModel:
    """A function of the user's that builds a model, and the SHA-256 of its file."""

    function: ModelFunction
    sha256: str


NOTEBOOK = "python.py:"  # of the names of models that are objects, not files
REGISTERED: dict[str, OwnModel] = {}  # by FILE.py:FUNCTION


def register(name: str) -> OwnModel:
    """Import the file of `FILE.py:FUNCTION`, so that `own_model` can call its function.

    Modules beside the file can be imported from it. Raises `UserError` if there is no such file or
    function, or if the file raises an exception.
    """
    if name not in REGISTERED:
        function, sha256 = import_function(name)
        REGISTERED[name] = OwnModel(function, sha256)
    return REGISTERED[name]


def register_object(model: nn.Module | ModelFunction) -> str:
    """Register a model, or a function that builds one; return the name that stands for it."""
    name = f"{NOTEBOOK}{getattr(model, '__name__', type(model).__name__)}"
    function = (lambda *_: copy.deepcopy(model)) if isinstance(model, nn.Module) else model
    REGISTERED[name] = OwnModel(function, "")
    return name


def sha256(name: str) -> str:
    """Return the SHA-256 of the file of a registered `FILE.py:FUNCTION`; "" for other models."""
    return REGISTERED[name].sha256 if name in REGISTERED else ""


def check_same(source: str, trained: str, trained_sha256: str, given: str) -> None:
    """Register the model `given` by the user for weights or a run of the model `trained`.

    `source` is the path of these. Raises `UserError` if it is another function, or if its file has
    another SHA-256 than in training.
    """
    if not is_code(trained):
        raise UserError(f"{source} holds {trained}, not {given}", "Leave out --model")
    if given.rpartition(":")[2] != trained.rpartition(":")[2]:
        raise UserError(f"{source} holds {trained}, not {given}", "Give the function of training")
    if register(given).sha256 != trained_sha256:
        raise UserError(
            f"{given.rpartition(':')[0]} has changed since the training of {source}",
            "Give the file as it was in training",
        )


def import_function(name: str) -> tuple[Callable, str]:
    """Return the function of `FILE.py:FUNCTION`, and the SHA-256 of the file in hexadecimal."""
    file, _, function_name = name.rpartition(":")
    path = Path(file)
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})", "Check the path") from error
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise raised(file, error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{file} has no function {function_name}".rstrip(), "Check its name")
    return function, sha256


def raised(what: str, error: Exception) -> UserError:
    """Return the error for an exception in the user's code."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".!")
    return UserError(f"{what} raised {reason}", "Correct it; --debug shows the traceback")


def own_model(num_classes: int, in_chans: int, image_size: int, name: str) -> nn.Module:
    """Return what the registered function `FILE.py:FUNCTION` returns for these arguments.

    Raises `UserError` if it is not registered, raises an exception, or returns anything but a
    module that maps images [n, in_chans, image_size, image_size] to logits [n, num_classes].
    """
    if name not in REGISTERED:
        raise UserError(
            f"the model is {name}, code that runs only if you name it yourself",
            f"If you trust that file, give --model {name}",
        )
    try:
        model = REGISTERED[name].function(num_classes, in_chans, image_size)
    except Exception as error:
        raise raised(name, error) from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise UserError(f"{name} returned {kind}, not a torch.nn.Module", "Return a model")
    _check_output(model, name, num_classes, (2, in_chans, image_size, image_size))
    return model


@torch.no_grad()
def _check_output(
    model: nn.Module, name: str, num_classes: int, shape: tuple[int, int, int, int]
) -> None:
    """Raise `UserError` if images of this shape do not give logits [n, num_classes]."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        output = model.eval()(torch.zeros(shape))
    except Exception as error:
        raise raised(f"{name}, for images {list(shape)},", error) from error
    finally:
        for module, mode in modes:
            module.training = mode
    expected, got = [shape[0], num_classes], type(output).__name__
    if isinstance(output, Tensor):
        got = str(list(output.shape))
    if got != str(expected):
        raise UserError(
            f"{name} returned {got} for images {list(shape)}, not logits {expected}",
            "Its arguments are num_classes, in_chans and image_size",
        )
