"""Fine-tuning: weights to begin with, and what of the network stays as it is."""

from typing import Any

from torch import nn

from lab import checkpoint, console
from lab.config import TrainConfig
from lab.errors import UserError
from lab.models import find_model, head_names


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


def _take_file(network: nn.Module, model: dict[str, Any], path_given: str) -> list[str]:
    """Fills the network from a weights file; the names of the head's tensors that stayed new."""
    path = checkpoint.find_weights(path_given)
    found = checkpoint.read_info(path)["model"]
    if find_model(found["name"]) != find_model(model["name"]):
        raise UserError(
            f"{path} holds {found['name']}, not {model['name']}", f"Give --model {found['name']}"
        )
    for key, what in {"channels": "channels", "image_size": "pixels a side"}.items():
        if found[key] != model[key]:
            raise UserError(
                f"{path} was trained on images of {found[key]} {what}, and these have {model[key]}",
                f"Give --image-size {found[key]}"
                if key == "image_size"
                else "Give data like that it was trained on",
            )
    tensors, expected = checkpoint.read_tensors(path), network.state_dict()
    heads = head_names(**model)
    fresh = [n for n in heads if n in tensors and tensors[n].shape != expected[n].shape]
    kept = {name: tensor for name, tensor in tensors.items() if name not in fresh}
    wanted = {name: tensor.shape for name, tensor in expected.items() if name not in fresh}
    for name in sorted(wanted.keys() ^ kept.keys()):
        raise _other_architecture(path_given, name)
    for name, tensor in kept.items():
        if tensor.shape != wanted[name]:
            raise _other_architecture(path_given, name)
    network.load_state_dict(kept, strict=False)
    return sorted(fresh)


def _other_architecture(path: str, name: str) -> UserError:
    return UserError(
        f"{path} holds the weights of another architecture: they differ in {name}",
        "Give a file that train.py wrote for this --model",
    )


def freeze(network: nn.Module, model: dict[str, Any], what: str) -> None:
    """Takes all but the head out of training, where `what` is "backbone".

    Frozen parameters get no gradient: no optimizer and no exchange between processes sees them.
    `Trainer.set_training` keeps BatchNorm's statistics.
    """
    if what == "backbone":
        heads = head_names(**model)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in heads)
