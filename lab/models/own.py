"""Models that are code of the user's: `--model FILE.py:FUNCTION`, and the argument of `train.main`.

Loading a file from a stranger must not run code (promise P4). Weights, checkpoints and settings
files can contain `FILE.py:FUNCTION`, so it is imported only by `register`, which scripts call with
what the user gave on the command line. `own_model` builds nothing else.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab.config.schema import is_code
from lab.errors import UserError
from lab.own_code import OBJECT, file_sha256, import_function, raised

ModelFunction = Callable[[int, int, int], nn.Module]  # of num_classes, in_chans and image_size


@dataclass(frozen=True)
class OwnModel:
    """A function of the user's that builds a model, and the SHA-256 of its file."""

    function: ModelFunction
    sha256: str
    is_module: bool = False  # whether it returns a copy of a model, whatever its arguments are


REGISTERED: dict[str, OwnModel] = {}  # by FILE.py:FUNCTION


def register(name: str) -> OwnModel:
    """Import the file of `FILE.py:FUNCTION`, so that `own_model` can call its function.

    Modules beside the file can be imported from it. Raises `UserError` if there is no such file or
    function, or if the file raises an exception.
    """
    known = REGISTERED.get(name)
    if known and not known.sha256:  # an object of `register_object`
        return known
    sha256 = file_sha256(name)
    if known is None or known.sha256 != sha256:  # a notebook may edit the file between two calls
        REGISTERED[name] = OwnModel(import_function(name), sha256)
    return REGISTERED[name]


def register_object(model: nn.Module | ModelFunction) -> str:
    """Register a model, or a function that builds one; return the name that stands for it."""
    name = f"{OBJECT}{getattr(model, '__name__', type(model).__name__)}"
    if isinstance(model, nn.Module):
        REGISTERED[name] = OwnModel(lambda *_: copy.deepcopy(model), "", is_module=True)
    else:
        REGISTERED[name] = OwnModel(model, "")
    return name


def has_fixed_shape(name: str) -> bool:
    """Return whether a registered model is a module, whose number of classes cannot be changed."""
    return name in REGISTERED and REGISTERED[name].is_module


def sha256(name: str) -> str:
    """Return the SHA-256 of the file of a registered `FILE.py:FUNCTION`; "" for other models."""
    return REGISTERED[name].sha256 if name in REGISTERED else ""


def check_same(source: str, trained: str, trained_sha256: str, given: str) -> None:
    """Register the model `given` by the user for weights or a run of the model `trained`.

    `source` is the path of these. Raises `UserError` if it is another function, or if its file has
    another SHA-256 than in training.
    """
    if not is_code(trained):
        raise UserError(
            f"--model is only for a function of yours, and {source} holds {trained}",
            "Leave out --model",
        )
    if given.rpartition(":")[2] != trained.rpartition(":")[2]:
        raise UserError(
            f"{source} holds {trained}, not {given}", "Give the function that it was trained with"
        )
    if register(given).sha256 != trained_sha256:
        raise UserError(
            f"{given.rpartition(':')[0]} has changed since the training of {source}",
            "Give the file as it was in training",
        )


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
    except (Exception, SystemExit) as error:
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
    """Raise `UserError` if images of this shape do not give logits [n, num_classes].

    A model without parameters is an error, too. In training mode, a tuple may also contain the
    logits of auxiliary classifiers, see `build_model`.
    """
    modes = [(module, module.training) for module in model.modules()]
    expected = [shape[0], num_classes]
    for training in (False, True):
        try:
            if training:  # changes the statistics of BatchNorm layers, and draws random numbers
                with torch.random.fork_rng(devices=[]):
                    output = copy.deepcopy(model).train()(torch.zeros(shape))
            else:  # the model itself: this initializes the parameters of lazy modules
                output = model.eval()(torch.zeros(shape))
        except Exception as error:
            raise raised(f"{name}, for images {list(shape)},", error) from error
        finally:
            for module, mode in modes:
                module.training = mode
        has_auxiliary = training and isinstance(output, tuple) and len(output) > 0
        for logits in output if has_auxiliary else (output,):
            got = type(logits).__name__
            if isinstance(logits, Tensor):
                got = str(list(logits.shape))
            if got != str(expected):
                when = " in training mode" if training else ""
                raise UserError(
                    f"{name} returned {got} for images {list(shape)}{when}, not logits {expected}",
                    "Its arguments are num_classes, in_chans and image_size",
                )
        if has_auxiliary and not hasattr(model, "auxiliary_weight"):
            raise UserError(
                f"{name} returned a tuple in training mode, and has no auxiliary_weight",
                "Give it this attribute, the weight of the losses of auxiliary classifiers",
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{name} has no parameters to train", "Return a model that has some")
