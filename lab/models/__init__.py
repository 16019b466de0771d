"""MODELS: every network by name; build_model makes one. Listing them imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """What the rest of the project needs to know of a network before it is built."""

    factory: str  # "module:class" in this package
    dataset: str  # the data set it trains on unless told otherwise
    image_size: int  # pixels a side, unless told otherwise
    large: bool  # its arithmetic outweighs its overheads: bfloat16 and channels_last pay


MODELS = {
    "lenet5": ModelSpec("classic:LeNet5", dataset="mnist", image_size=32, large=False),
    "alexnet": ModelSpec("classic:AlexNet", dataset="cifar10", image_size=32, large=True),
}


def find_model(name: str) -> ModelSpec:
    """The spec of a network; raises `UserError` with the list of the known."""
    if name not in MODELS:
        raise UserError(f"there is no model {name}", f"Known: {', '.join(MODELS)}")
    return MODELS[name]


def build_model(
    name: str, *, num_classes: int, channels: int, image_size: int, init: str = "default"
) -> nn.Module:
    """A network that maps images float32 [n, channels, image_size, image_size] to logits [n, K]."""
    module, factory = find_model(name).factory.split(":")
    package = importlib.import_module(f"lab.models.{module}")
    network = getattr(package, factory)(num_classes, channels, image_size)
    if init == "kaiming":
        from lab.models.classic import kaiming_init

        kaiming_init(network)
    return network
