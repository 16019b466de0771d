"""Fine-tuning: weights to begin with, and what of the network stays as it is."""

from typing import Any

from torch import nn

from lab import checkpoint, console
from lab.config import TrainConfig
from lab.errors import UserError
from lab.models import find_model, head_names

FEW_STEPS = 300


def start_from(network: nn.Module, model: dict[str, Any], config: TrainConfig) -> None:
    """Fills the network with the weights that `config` names, if any, and says so.

    `model` holds what `build_model` made the network of. Raises `UserError` where weights are
    missing or do not fit.
    """
    if config.pretrained:
        from lab.models.imagenet import take_over

        source = find_model(config.model).weights
        with console.working(f"fetching torchvision's ImageNet weights of {source}"):
            remarks = take_over(network, source, head_names(**model))
        console.say(f"ImageNet weights of {source}; " + "; ".join(remarks))
    elif config.init_from:
        fresh = _take_file(network, model, config.init_from)
        head = f"new head: {', '.join(fresh)}" if fresh else "its head too"
        console.say(f"weights of {config.init_from}; {head}")


def warn_of_few_steps(config: TrainConfig, num_batches: int) -> None:
    """Warns where a new run of epochs of `num_batches` will end before random weights learn much.

    One that was told when to stop, with `max_steps`, is a trial, and known to be one.
    """
    steps = config.epochs * num_batches
    if steps < FEW_STEPS and not (config.max_steps or config.pretrained or config.init_from):
        pretrained = "--pretrained, " if find_model(config.model).weights else ""
        console.warn(
            f"only {steps} {'steps' if steps > 1 else 'step'} in all: too few to learn much from "
            f"random weights. Give {pretrained}a smaller --batch-size or more --epochs."
        )


def _take_file(network: nn.Module, model: dict[str, Any], path_given: str) -> list[str]:
    """Fills the network from a weights file; the names of the head's tensors that stayed new."""
    path = checkpoint.find_weights(path_given)
    found = checkpoint.read_info(path)["model"]
    if find_model(found["name"]) != find_model(model["name"]):
        raise UserError(
            f"{path} holds {found['name']}, not {model['name']}", f"Give --model {found['name']}"
        )
    if found["channels"] != model["channels"]:
        raise UserError(
            f"{path} takes images with {found['channels']} channels, the data's have "
            f"{model['channels']}",
            "Give data like that it was trained on",
        )
    if found["image_size"] != model["image_size"]:
        raise UserError(
            f"{path} was trained on images of {found['image_size']} pixels, not "
            f"{model['image_size']}",
            f"Give --image-size {found['image_size']}",
        )
    tensors, expected = checkpoint.read_tensors(path), network.state_dict()
    fresh = {
        name
        for name in head_names(**model) & tensors.keys()
        if tensors[name].shape != expected[name].shape
    }
    for name in sorted((tensors.keys() | expected.keys()) - fresh):
        fits = name in tensors and name in expected
        if not fits or tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{path} holds the weights of another architecture: it differs in {name}",
                "Give a file that train.py wrote for this --model",
            )
    kept = {name: tensor for name, tensor in tensors.items() if name not in fresh}
    network.load_state_dict(kept, strict=False)
    return sorted(fresh)


def freeze(network: nn.Module, model: dict[str, Any], what: str) -> None:
    """Takes all but the head out of training, where `what` is "backbone".

    Frozen parameters get no gradient: no optimizer and no exchange between processes sees them.
    `Trainer.set_training` keeps BatchNorm's statistics.
    """
    if what == "backbone":
        heads = head_names(**model)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in heads)
