"""RECIPES: named hyper-parameters that a (model, data set) pair starts from.

A recipe is layered. Its entries apply in this order where their key fits: `*`, the data set, the
model's family (its name up to the first hyphen or colon: `vit`, `torchvision`), the model,
`family/dataset`, `model/dataset`; the command line comes last.
"""

import re
from typing import Any

from lab.config.schema import TrainConfig
from lab.errors import UserError

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # The two university notebooks to the letter, their choice of the best epoch on the test split
    # included.
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
    # The best we know; results/ has the runs.
    "default": {
        "*": dict(
            batch_size=128,
            epochs=10,
            augment="crop,flip",
            schedule="linear",
            warmup_epochs=1,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
        ),
        "mnist": dict(augment="none"),
        "fashion-mnist": dict(augment="flip"),
        "digits": dict(augment="crop", epochs=15),
        "lenet5": dict(
            batch_size=64, optimizer="nesterov", lr=0.1, weight_decay=5e-4, warmup_epochs=1
        ),
        "lenet5/mnist": dict(epochs=5, optimizer="muon", lr=2e-3, weight_decay=0.1),
        "alexnet": dict(
            optimizer="muon",
            lr=2e-3,
            weight_decay=0.5,
            dropout=0.25,  # half, the paper's, is for many more epochs
            warmup_epochs=1,
            init="kaiming",
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
        # Without BatchNorm, a step too large is not forgiven.
        "vit": dict(lr=5e-4, max_grad_norm=1, warmup_epochs=2, label_smoothing=0.1, epochs=40),
        "vit/digits": dict(lr=2e-4),  # whose warm-up is but twenty steps
        "torchvision": dict(lr=3e-4, max_grad_norm=1, label_smoothing=0.1, epochs=20),
    },
    # A few seconds on a laptop: for tests and for a first look at an installation.
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
        "alexnet": dict(lr=5e-4, init="kaiming"),
        "vit": dict(lr=5e-4, max_grad_norm=1),
        "torchvision": dict(lr=3e-4, max_grad_norm=1),
    },
}


def model_defaults(model: str) -> tuple[str, int]:
    """Return the dataset and the image size in pixels that a model is trained on by default."""
    if model.startswith("torchvision:"):
        return "cifar10", 224
    return ("mnist", 32) if model == "lenet5" else ("cifar10", 32)


def resolve(overrides: dict[str, Any]) -> TrainConfig:
    """Return the complete settings: defaults, then the recipe of the pair, then the overrides.

    Raises `UserError` for an unknown recipe, and for a value outside its bounds.
    """
    model = overrides.get("model", TrainConfig.model)
    default_dataset, image_size = model_defaults(model)
    dataset = overrides.get("dataset") or default_dataset
    name = overrides.get("recipe", TrainConfig.recipe)
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name}", f"Known: {', '.join(RECIPES)}")
    settings: dict[str, Any] = {"image_size": image_size}
    family = re.split("[-:_]", model)[0]
    for key in ("*", dataset, family, model, f"{family}/{dataset}", f"{model}/{dataset}"):
        settings |= RECIPES[name].get(key, {})
    settings |= {k: v for k, v in overrides.items() if not (k == "image_size" and v == 0)}
    if "warmup_epochs" not in overrides:  # a recipe's warm-up shrinks with a short --epochs
        epochs = settings.get("epochs", TrainConfig.epochs)
        settings["warmup_epochs"] = min(settings.get("warmup_epochs", 0.0), epochs / 5)
    return TrainConfig(**(settings | {"model": model, "dataset": dataset}))
