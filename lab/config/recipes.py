"""RECIPES: named hyperparameters for each pair of model and dataset.

A recipe has layers, which apply in this order: `*`, the dataset (`folder` for the user's own
images: a directory, a manifest, hf:NAME or FILE.py:FUNCTION), the family of the model (its name up
to the first `-`, `:` or `_`, such as `vit` or `torchvision`), the model, `family/dataset`,
`model/dataset`. The settings file of --config and the command line override them.
"""

import re
from dataclasses import replace
from typing import Any

from lab.config.schema import (
    AUTO_STEPS,
    MAX_AUTO_EPOCHS,
    MIN_AUTO_EPOCHS,
    TIMM,
    TORCHVISION,
    TrainConfig,
    is_code,
    is_own_dataset,
)
from lab.errors import UserError, suggestion

IMAGES_MODEL = "torchvision:efficientnet_b0"  # default --model for the user's own images

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # Exactly the settings of the two university notebooks, which select the best epoch on the
    # test split.
    "notebook": {
        "*": dict(
            val_fraction=0.0,
            batch_size=128,
            epochs=5,
            optimizer="sgd",
            lr=0.01,
            momentum=0.9,
            weight_decay=5e-4,
            decay_biases=True,
            schedule="step",
            lr_step_epochs=5,
            lr_gamma=0.5,
        ),
        "cifar10": dict(augment="crop,flip"),
        "cifar100": dict(augment="crop,flip"),
        "folder": dict(augment="crop,flip"),
        "alexnet": dict(epochs=20, lr_step_epochs=10),
    },
    # The best known settings; results/ has the runs.
    "default": {
        "*": dict(
            batch_size=128,
            epochs=10,
            augment="crop,flip",
            schedule="linear",
            warmup_epochs=1.0,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
        ),
        "mnist": dict(augment="none"),
        "fashion-mnist": dict(augment="flip"),
        "digits": dict(augment="crop", epochs=15),
        "folder": dict(monitor="macro_f1"),
        "lenet5": dict(batch_size=64, optimizer="nesterov", lr=0.1, weight_decay=5e-4),
        "lenet5/mnist": dict(
            epochs=5, optimizer="muon", lr=5e-3, weight_decay=0.1, warmup_epochs=0.25
        ),
        "alexnet": dict(
            optimizer="muon",
            lr=2e-3,
            weight_decay=0.5,
            dropout=0.25,  # the paper's 0.5 needs many more epochs
            init="kaiming_zero",
            label_smoothing=0.1,
            epochs=20,
        ),
        "alexnet/cifar10": dict(augment="crop,flip,cutout"),
        "alexnet/cifar100": dict(augment="crop,flip,cutout"),
        "alexnet/folder": dict(augment="crop,flip,cutout"),
        "googlenet": dict(label_smoothing=0.1, epochs=20),
        "densenet": dict(label_smoothing=0.1, epochs=20),
        "densenet121": dict(label_smoothing=0.1, epochs=20),
        "mobilenet": dict(label_smoothing=0.1, epochs=20),
        "efficientnet": dict(label_smoothing=0.1, epochs=20),
        # Without BatchNorm, training diverges if a step is too large.
        "vit": dict(lr=5e-4, max_grad_norm=1.0, warmup_epochs=2.0, label_smoothing=0.1, epochs=40),
        "vit/digits": dict(lr=2e-4),  # its warmup is only 20 steps
        "torchvision": dict(lr=3e-4, max_grad_norm=1.0, label_smoothing=0.1, epochs=20),
        "timm": dict(lr=3e-4, max_grad_norm=1.0, label_smoothing=0.1, epochs=20),
    },
    # Fine-tuning on the user's own images. docs/training.md explains it; benchmarks/finetune.py
    # compares it with training from scratch.
    "finetune": {
        "*": dict(
            pretrained=True,
            linear_probe=True,
            freeze="batchnorm",
            epochs=0,
            batch_size=32,
            optimizer="adamw",
            lr=1e-3,
            layer_decay=0.75,
            weight_decay=0.05,
            schedule="cosine",
            warmup_epochs=1.0,
            augment="resized-crop,flip,trivialaugment",
            label_smoothing=0.1,
            ema_decay=0.99,
            monitor="macro_f1",
            max_grad_norm=1.0,
        ),
        "efficientnet_lite0": dict(crop_pct=0.875),
    },
    # A few seconds on a laptop: for tests and to check an installation.
    "smoke": {
        "*": dict(
            epochs=2,
            max_steps=20,
            batch_size=32,
            max_train_samples=320,
            max_eval_samples=100,
            optimizer="adamw",
            lr=2e-3,
            weight_decay=0.01,
            schedule="constant",
        ),
        "alexnet": dict(lr=5e-4, init="kaiming_zero"),
        "vit": dict(lr=5e-4, max_grad_norm=1.0),
        "torchvision": dict(lr=3e-4, max_grad_norm=1.0),
        "timm": dict(lr=3e-4, max_grad_norm=1.0),
    },
}


def model_defaults(model: str) -> tuple[str, int]:
    """Return the dataset and the image size in pixels that a model is trained on by default.

    The size is 0 for a model of torchvision or timm, which knows its own.
    """
    if model.startswith((TORCHVISION, TIMM)):
        return "cifar10", 0
    if model == "efficientnet_lite0":
        return "cifar10", 224
    return ("mnist", 32) if model == "lenet5" else ("cifar10", 32)


def resolve(overrides: dict[str, Any]) -> TrainConfig:
    """Return the complete settings: defaults, overridden by the recipe and then by `overrides`.

    Raises `UserError` for an unknown recipe or a value outside its bounds.
    """
    dataset = overrides.get("dataset", "")
    own_images = bool(dataset) and is_own_dataset(dataset)
    model = overrides.get("model", IMAGES_MODEL if own_images else TrainConfig.model)
    default_dataset, image_size = model_defaults(model)
    dataset = dataset or default_dataset
    of_library = model.startswith((TORCHVISION, TIMM))
    layer = "folder" if own_images else dataset
    pretrained = own_images and overrides.get("pretrained", of_library)
    finetuned = pretrained or (own_images and overrides.get("init_checkpoint"))
    name = overrides.get("recipe", "finetune" if finetuned else "default")
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name}", suggestion(name, RECIPES))
    settings: dict[str, Any] = {"image_size": image_size}
    by_weights = of_library or pretrained
    if by_weights:  # `lab.models.with_input_defaults` knows what the weights expect
        settings |= {"image_size": 0, "crop_pct": 0.0, "interpolation": "auto"}
    family = "" if is_code(model) else re.split("[-:_]", model)[0]
    if is_code(model) and own_images:
        settings["image_size"] = 224
    for key in ("*", layer, family, model, f"{family}/{layer}", f"{model}/{layer}"):
        settings |= RECIPES[name].get(key, {})
    settings |= {k: v for k, v in overrides.items() if not (k == "image_size" and v == 0)}
    if not by_weights:
        settings["crop_pct"] = settings.get("crop_pct") or 1.0
        if settings.get("interpolation") == "auto":
            settings["interpolation"] = "bilinear"
    if overrides.get("init_checkpoint") and "pretrained" not in overrides:
        settings["pretrained"] = False
    epochs = settings.get("epochs", TrainConfig.epochs) or MIN_AUTO_EPOCHS
    if "warmup_epochs" not in overrides:  # fewer --epochs shorten the recipe's warmup
        settings["warmup_epochs"] = min(settings.get("warmup_epochs", 0.0), epochs / 5)
    return TrainConfig(**(settings | {"model": model, "dataset": dataset, "recipe": name}))


def resolve_epochs(config: TrainConfig, steps_per_epoch: int) -> TrainConfig:
    """Return the settings with the number of epochs that `--epochs 0` stands for."""
    if config.epochs:
        return config
    epochs = min(max(round(AUTO_STEPS / steps_per_epoch), MIN_AUTO_EPOCHS), MAX_AUTO_EPOCHS)
    return replace(config, epochs=epochs)
