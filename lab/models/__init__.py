"""Models by name. This module does not import torch, so that --help is fast.

`torchvision:NAME` and `timm:NAME` are the other classifiers of these libraries, unchanged.
`FILE.py:FUNCTION` is code of the user's, see `lab.models.own`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lab.config.schema import TIMM, TORCHVISION, TrainConfig, is_code
from lab.errors import UserError, suggestion

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSpec:
    """Describe how images are prepared for the weights that a library publishes."""

    image_size: int = 0  # pixels
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class ModelSpec:
    """Properties of a model that are needed before it is built."""

    factory: str  # "module:function" in this package, or "module:function:argument"
    weights: str = ""  # that --pretrained loads: the name of a torchvision model, or timm:NAME
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


@functools.cache
def find_model(name: str) -> ModelSpec:
    """Return the spec of a model. Raises `UserError` for an unknown name."""
    library_name = name.partition(":")[2]
    if is_code(name):
        return ModelSpec(f"own:own_model:{name}")
    if name.startswith(TORCHVISION):
        from lab.models.external import check_torchvision_name

        check_torchvision_name(library_name)
        return ModelSpec(f"external:torchvision_model:{library_name}", library_name)
    if name.startswith(TIMM):
        from lab.models.external import check_timm_name, has_timm_weights

        check_timm_name(library_name)
        weights = name if has_timm_weights(library_name) else ""
        return ModelSpec(f"external:timm_model:{library_name}", weights)
    if name not in MODELS:
        from torchvision import models  # takes seconds to import

        if name in models.list_models(module=models):
            raise UserError(f"unknown model {name}", f"Did you mean {TORCHVISION}{name}?")
        hint = suggestion(name, [*MODELS, f"{TORCHVISION}NAME", f"{TIMM}NAME"])
        raise UserError(f"unknown model {name}", hint)
    return MODELS[name]


def check_model(name: str, pretrained: bool) -> None:
    """Raise `UserError` for an unknown model, or if `pretrained` and it has no pretrained weights.

    The user named the model: code of `FILE.py:FUNCTION` is imported.
    """
    if is_code(name):
        from lab.models.own import register

        register(name)
    spec = find_model(name)
    if pretrained and not spec.weights:
        known = ", ".join(name for name, spec in MODELS.items() if spec.weights)
        raise UserError(
            f"there are no pretrained weights for {name}",
            f"Known: {known}, and most of {TORCHVISION}NAME and {TIMM}NAME",
        )


def input_spec(name: str) -> InputSpec:
    """Return how images are prepared for the weights that --pretrained loads for a model."""
    if name.startswith(TIMM):
        from lab.models.external import timm_input

        return InputSpec(**timm_input(name.removeprefix(TIMM)))
    if weights := find_model(name).weights or name.partition(TORCHVISION)[2]:
        from lab.models.external import torchvision_input

        return InputSpec(**torchvision_input(weights))
    return InputSpec()


def with_input_defaults(config: TrainConfig) -> TrainConfig:
    """Return the settings with the image size, crop and interpolation of the model's weights.

    From random weights, a model of torchvision or timm only takes over their image size.
    """
    spec = input_spec(config.model)
    size = config.image_size or spec.image_size
    if not (config.pretrained or config.init_checkpoint):
        spec = InputSpec()
    interpolation = spec.interpolation if config.interpolation == "auto" else config.interpolation
    crop_pct = config.crop_pct or spec.crop_pct
    return replace(config, image_size=size, crop_pct=crop_pct, interpolation=interpolation)


def build_model(
    name: str, *, num_classes: int, in_chans: int, image_size: int, init: str = "default"
) -> nn.Module:
    """Return a model that maps images float32 [n, C, image_size, image_size] to logits [n, K].

    In training mode it may return a tuple: the logits, and those of auxiliary classifiers, whose
    losses are weighted by its attribute `auxiliary_weight`. Raises `UserError` if the model cannot
    take images of this size.
    """
    module, factory, *more = find_model(name).factory.split(":", 2)
    build = getattr(importlib.import_module(f"lab.models.{module}"), factory)
    model = build(num_classes, in_chans, image_size, *more)
    if init != "default":
        from lab.models.alexnet import kaiming_init

        kaiming_init(model, zero_last=init == "kaiming_zero")
    return model


def build_without_memory(name: str, **architecture: Any) -> nn.Module:
    """Return the model of `build_model` on the meta device, which allocates nothing.

    A model that computes with the values of tensors when it is built, and code of the user's, is
    built in memory.
    """
    import torch

    if is_code(name):
        return build_model(name, **architecture)
    try:
        with torch.device("meta"):
            return build_model(name, **architecture)
    except NotImplementedError:
        with torch.random.fork_rng(devices=[]):
            return build_model(name, **architecture)


def classifier_param_names(
    name: str, *, num_classes: int, in_chans: int, image_size: int
) -> frozenset[str]:
    """Return the names of the parameters whose shape depends on the number of classes.

    All other parameters are the backbone's. There are none if the user gave a module instead of a
    function: which of its layers is the classifier is not known.
    """
    if is_code(name):  # in a notebook, the user's code may change between two calls
        from lab.models.own import has_fixed_shape

        if has_fixed_shape(name):
            return frozenset()
        return _find_classifier_params.__wrapped__(name, num_classes, in_chans, image_size)
    return _find_classifier_params(name, num_classes, in_chans, image_size)


@functools.cache  # it builds the model twice, and is called for several purposes
def _find_classifier_params(
    name: str, num_classes: int, in_chans: int, image_size: int
) -> frozenset[str]:
    def shapes(num_classes: int) -> dict[str, Any]:
        model = build_without_memory(
            name, num_classes=num_classes, in_chans=in_chans, image_size=image_size
        )
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    other = shapes(num_classes + 1)
    return frozenset(name for name, size in shapes(num_classes).items() if size != other[name])
