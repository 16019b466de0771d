"""Models of other libraries, as these build them: `torchvision:NAME` and `timm:NAME`."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models

from lab.errors import UserError, first_line, install_hint, suggestion
from lab.models.small_images import fit_channels


def import_timm() -> Any:
    """Return the module timm. Raises `UserError` if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError("--model timm:NAME needs timm", install_hint("timm")) from error
    return timm


def check_torchvision_name(name: str) -> None:
    """Raise `UserError` if torchvision has no classifier of this name."""
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name}".rstrip(), suggestion(name, known))


def check_timm_name(name: str) -> None:
    """Raise `UserError` if timm has no model of this name, which may end in `.` and a weights tag.

    timm creates models that have no list of weights, too.
    """
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UserError(f"timm has no model {architecture}".rstrip(), suggestion(name, known))
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise UserError(f"timm has no weights {tag} of {architecture}", suggestion(name, tags))


def has_timm_weights(name: str) -> bool:
    """Return whether timm publishes weights of its model `name`."""
    return import_timm().models.get_pretrained_cfg(name).hf_hub_id is not None


def torchvision_input(name: str) -> dict[str, Any]:
    """Return the fields of `InputSpec` for torchvision's default weights of its model `name`."""
    preprocessing = models.get_model_weights(name).DEFAULT.transforms()
    size = preprocessing.crop_size[0]
    return dict(
        image_size=size,
        crop_pct=size / preprocessing.resize_size[0],
        interpolation=preprocessing.interpolation.value,
        mean=tuple(preprocessing.mean),
        std=tuple(preprocessing.std),
    )


def timm_input(name: str) -> dict[str, Any]:
    """Return the fields of `InputSpec` for timm's default weights of its model `name`."""
    timm = import_timm()
    config = timm.data.resolve_data_config(
        pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict()
    )
    bicubic = config["interpolation"] in ("bicubic", "random")
    return dict(
        image_size=config["input_size"][-1],
        crop_pct=min(1.0, config["crop_pct"]),  # some models were tested on images with a border
        interpolation="bicubic" if bicubic else "bilinear",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def torchvision_model(num_classes: int, in_chans: int, image_size: int, name: str) -> nn.Module:
    """Return torchvision's model `name` for this number of classes and channels.

    Raises `UserError` if it cannot take images of this size.
    """
    _check_image_size(_create_torchvision_model, name, in_chans, image_size)
    model = _create_torchvision_model(name, num_classes, in_chans, image_size)
    if name in ("googlenet", "inception_v3"):  # a plain attribute
        object.__setattr__(model, "auxiliary_weight", 0.3)
    return model


def timm_model(num_classes: int, in_chans: int, image_size: int, name: str) -> nn.Module:
    """Return timm's model `name` for this number of classes and channels.

    Raises `UserError` if it cannot take images of this size.
    """
    _check_image_size(create_timm_model, name, in_chans, image_size)
    return create_timm_model(name, num_classes, in_chans, image_size)


def _create_torchvision_model(
    name: str, num_classes: int, in_chans: int, image_size: int
) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        settings["image_size"] = image_size
    elif name.startswith("maxvit_"):
        settings["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        settings["init_weights"] = True  # torchvision warns if it is not set
    return fit_channels(models.get_model(name, **settings), in_chans)


def create_timm_model(
    name: str, num_classes: int, in_chans: int, image_size: int, **settings: Any
) -> nn.Module:
    """Return `timm.create_model` of these arguments, with `img_size` if the model takes it."""
    timm = import_timm()
    if timm.models.get_pretrained_cfg(name).fixed_input_size:
        settings["img_size"] = image_size
    return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **settings)


@functools.cache  # a model is built several times
def _check_image_size(
    create: Callable[..., nn.Module], name: str, in_chans: int, image_size: int
) -> None:
    """Raise `UserError` if the model cannot take images of this size.

    Shapes are tried without arithmetic, in training mode to include auxiliary classifiers. Some
    models, such as RegNet, cannot be built on the meta device.
    """

    def try_shapes(device: str) -> None:
        # Initial weights must not depend on whether a model of this size was built before.
        with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
            model = create(name, 2, in_chans, image_size)
            model(torch.empty(2, in_chans, image_size, image_size))

    try:
        try:
            try_shapes("meta")
        except NotImplementedError:
            try_shapes("cpu")
    except (RuntimeError, ValueError, AssertionError) as error:
        library = "timm" if create is create_timm_model else "torchvision"
        raise UserError(
            f"{library}:{name} cannot take images of {image_size} pixels ({first_line(error)})",
            "Give another --image-size; most were made for 224",
        ) from error
