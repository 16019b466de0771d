"""`--model torchvision:NAME`: any other torchvision classifier, as torchvision builds it."""

from typing import Any

import torch
from torch import nn
from torchvision import models

from lab.errors import UserError, suggestion
from lab.models.small_images import fit_channels


def check_torchvision_name(name: str) -> None:
    """Raise `UserError` if torchvision has no classifier of this name."""
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name}".rstrip(), suggestion(name, known))


def torchvision_model(num_classes: int, in_chans: int, image_size: int, name: str) -> nn.Module:
    """Return torchvision's model `name` for this number of classes and channels.

    Raises `UserError` if it cannot take images of this size.
    """
    settings: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        settings["image_size"] = image_size
    elif name.startswith("maxvit_"):
        settings["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        settings["init_weights"] = True  # torchvision warns if it is not set
    try:
        # Try the shapes, without arithmetic, in training mode to include auxiliary classifiers.
        with torch.device("meta"):
            model = fit_channels(models.get_model(name, **settings), in_chans)
            model(torch.empty(2, in_chans, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"torchvision:{name} cannot take images of {image_size} pixels ({reason})",
            "Give another --image-size; most were made for 224",
        ) from error
    model = fit_channels(models.get_model(name, **settings), in_chans)
    if name in ("googlenet", "inception_v3"):  # a plain attribute
        object.__setattr__(model, "auxiliary_weight", 0.3)
    return model
