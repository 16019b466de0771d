"""Models by name. This module does not import torch, so that --help is fast.

`torchvision:NAME` is any other classifier of torchvision, unchanged.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.errors import UserError, suggestion

if TYPE_CHECKING:
    from torch import nn

TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class ModelSpec:
    """Properties of a model that are needed before it is built."""

    factory: str  # "module:function" in this package, or "module:function:argument"
    weights: str = ""  # the torchvision model whose ImageNet weights --pretrained loads
    benefits_from_bf16: bool = True  # bfloat16 and channels_last make it faster
    cpu_bf16: bool = True  # on CPUs, too; depthwise convolutions are slower in bfloat16 there


MODELS = {
    "lenet5": ModelSpec("lenet:LeNet5", benefits_from_bf16=False),
    "alexnet": ModelSpec("alexnet:AlexNet"),
    "googlenet": ModelSpec("small_images:googlenet", "googlenet"),
    "densenet": ModelSpec("small_images:densenet"),
    "densenet121": ModelSpec("small_images:densenet121", "densenet121"),
    "mobilenet_v2": ModelSpec("small_images:mobilenet", "mobilenet_v2"),
    "mobilenet_v3_small": ModelSpec(
        "small_images:mobilenet_v3", "mobilenet_v3_small", cpu_bf16=False
    ),
    "efficientnet_b0": ModelSpec("small_images:efficientnet:b0", "efficientnet_b0", cpu_bf16=False),
    "efficientnet_b1": ModelSpec("small_images:efficientnet:b1", "efficientnet_b1", cpu_bf16=False),
    "efficientnet_b2": ModelSpec("small_images:efficientnet:b2", "efficientnet_b2", cpu_bf16=False),
    "efficientnet_b3": ModelSpec("small_images:efficientnet:b3", "efficientnet_b3", cpu_bf16=False),
    "efficientnet_b4": ModelSpec("small_images:efficientnet:b4", "efficientnet_b4", cpu_bf16=False),
    "efficientnet_b5": ModelSpec("small_images:efficientnet:b5", "efficientnet_b5", cpu_bf16=False),
    "efficientnet_b6": ModelSpec("small_images:efficientnet:b6", "efficientnet_b6", cpu_bf16=False),
    "efficientnet_b7": ModelSpec("small_images:efficientnet:b7", "efficientnet_b7", cpu_bf16=False),
    "efficientnet_lite0": ModelSpec("efficientnet_lite:efficientnet_lite0", cpu_bf16=False),
    "vit_tiny": ModelSpec("small_images:vit_tiny"),
    "vit_small": ModelSpec("small_images:vit_small"),
    "vit_hybrid": ModelSpec("small_images:vit_hybrid"),
}


def find_model(name: str) -> ModelSpec:
    """Return the spec of a model. Raises `UserError` for an unknown name."""
    if name.startswith(TORCHVISION):
        from lab.models.external import check_torchvision_name

        torchvision_name = name.removeprefix(TORCHVISION)
        check_torchvision_name(torchvision_name)
        return ModelSpec(f"external:torchvision_model:{torchvision_name}", torchvision_name)
    if name not in MODELS:
        from torchvision import models  # takes seconds to import

        if name in models.list_models(module=models):
            raise UserError(f"unknown model {name}", f"Did you mean {TORCHVISION}{name}?")
        hint = suggestion(name, [*MODELS, f"{TORCHVISION}NAME"])
        raise UserError(f"unknown model {name}", hint)
    return MODELS[name]


def check_model(name: str, pretrained: bool) -> None:
    """Raise `UserError` for an unknown model, or if `pretrained` and it has no ImageNet weights."""
    if pretrained and not find_model(name).weights:
        known = ", ".join(name for name, spec in MODELS.items() if spec.weights)
        raise UserError(
            f"there are no ImageNet weights for {name}", f"Known: {known}, {TORCHVISION}NAME"
        )
    find_model(name)


def build_model(
    name: str, *, num_classes: int, in_chans: int, image_size: int, init: str = "default"
) -> nn.Module:
    """Return a model that maps images float32 [n, C, image_size, image_size] to logits [n, K].

    In training mode it may return a tuple: the logits, and those of auxiliary classifiers, whose
    losses are weighted by its attribute `auxiliary_weight`. Raises `UserError` if the model cannot
    take images of this size.
    """
    module, factory, *more = find_model(name).factory.split(":")
    build = getattr(importlib.import_module(f"lab.models.{module}"), factory)
    model = build(num_classes, in_chans, image_size, *more)
    if init == "kaiming":
        from lab.models.alexnet import kaiming_init

        kaiming_init(model)
    return model


@functools.cache  # it builds the model twice, and is called for several purposes
def classifier_param_names(
    name: str, *, num_classes: int, in_chans: int, image_size: int
) -> frozenset[str]:
    """Return the names of the parameters whose shape depends on the number of classes.

    All other parameters are the backbone's.
    """
    import torch

    def shapes(num_classes: int) -> dict[str, torch.Size]:
        with torch.device("meta"):
            model = build_model(
                name, num_classes=num_classes, in_chans=in_chans, image_size=image_size
            )
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    other = shapes(num_classes + 1)
    return frozenset(name for name, size in shapes(num_classes).items() if size != other[name])
