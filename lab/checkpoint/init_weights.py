"""Fine-tuning: initial weights from ImageNet or another run, and freezing the backbone."""

from typing import Any

from torch import nn

from lab import console
from lab.checkpoint import weights
from lab.checkpoint.train_state import Checkpoint
from lab.config.schema import TrainConfig, is_code
from lab.errors import UserError
from lab.models import build_model, classifier_param_names, find_model, input_spec

FEW_STEPS = 300


def build_initial_model(
    architecture: dict[str, Any], config: TrainConfig, resumed: bool, steps_per_epoch: int
) -> nn.Module:
    """Return the model with its initial weights, and with what --freeze names excluded.

    Unless a run is resumed, these are the weights of --pretrained or --init-checkpoint, if any.
    Raises `UserError` if they are missing or do not fit.
    """
    model = build_model(**architecture, init=config.init)
    if not resumed:
        load_init_weights(model, architecture, config)
        warn_of_few_steps(config, steps_per_epoch)
    freeze(model, architecture, config.freeze)
    return model


def load_init_weights(model: nn.Module, architecture: dict[str, Any], config: TrainConfig) -> None:
    """Load the weights that --pretrained or --init-checkpoint names, if any, and print which."""
    if config.pretrained:
        from lab.models.pretrained import load_pretrained

        source = find_model(config.model).weights
        with console.status(f"loading the pretrained weights of {source}"):
            heads = classifier_param_names(**architecture)
            remarks = load_pretrained(model, source, heads, architecture)
        console.info(f"pretrained weights of {source}; " + "; ".join(remarks))
    elif config.init_checkpoint:
        new_params = _load_file(model, architecture, config.init_checkpoint)
        classifier = ", including the classifier"
        if new_params:
            classifier = f"; new classifier: {', '.join(new_params)}"
        console.info(f"weights of {config.init_checkpoint}{classifier}")


def initial_normalization(
    config: TrainConfig, checkpoint: Checkpoint | None
) -> tuple[Any, Any] | None:
    """Return the mean and standard deviation of the images that initial weights were trained on.

    A run that is resumed keeps its own, as it no longer needs the file of those weights.
    """
    if checkpoint:
        mean, std = checkpoint.metadata["normalization"]
        return mean, std
    if config.pretrained:
        spec = input_spec(config.model)
        return spec.mean, spec.std
    if config.init_checkpoint:
        metadata = weights.read_metadata(weights.find_weights(config.init_checkpoint))
        return metadata["mean"], metadata["std"]
    return None


def warn_of_few_steps(config: TrainConfig, steps_per_epoch: int) -> None:
    """Warn if a new run takes too few steps to learn much from random weights.

    A run with --max-steps is meant to be short.
    """
    steps = config.epochs * steps_per_epoch
    if steps < FEW_STEPS and not (config.max_steps or config.pretrained or config.init_checkpoint):
        pretrained = "--pretrained, " if find_model(config.model).weights else ""
        console.warn(
            f"only {steps} {'steps' if steps > 1 else 'step'} in total: too few to learn much from "
            f"random weights. Give {pretrained}a smaller --batch-size or more --epochs."
        )


def _load_file(model: nn.Module, architecture: dict[str, Any], init_checkpoint: str) -> list[str]:
    """Load a weights file into the model; return the names of head tensors left as initialized."""
    path = weights.find_weights(init_checkpoint)
    source = weights.read_metadata(path)["model"]
    both_code = is_code(source["name"]) and is_code(architecture["name"])
    if not both_code and find_model(source["name"]) != find_model(architecture["name"]):
        raise UserError(
            f"{path} holds {source['name']}, not {architecture['name']}",
            f"Give --model {source['name']}",
        )
    weights.check_channels(path, source["in_chans"], architecture["in_chans"])
    if source["image_size"] != architecture["image_size"]:
        raise UserError(
            f"{path} was trained on images of {source['image_size']} pixels, not "
            f"{architecture['image_size']}",
            f"Give --image-size {source['image_size']}",
        )
    tensors, expected = weights.read_tensors(path), model.state_dict()
    new_params = {
        name
        for name in classifier_param_names(**architecture) & tensors.keys()
        if tensors[name].shape != expected[name].shape
    }
    for name in sorted((tensors.keys() | expected.keys()) - new_params):
        missing = name not in tensors or name not in expected
        if missing or tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{path} holds the weights of another architecture: it differs in {name}",
                "Give a file that train.py wrote for this --model",
            )
    for name in new_params:
        del tensors[name]
    model.load_state_dict(tensors, strict=False)
    return sorted(new_params)


def freeze(model: nn.Module, architecture: dict[str, Any], part: str) -> None:
    """Exclude all parameters but the classifier's from training if `part` is "backbone".

    Frozen parameters get no gradient, so that neither the optimizer nor DistributedDataParallel
    handles them. `TrainStep.set_training_mode` keeps BatchNorm's statistics.
    """
    if part == "backbone":
        classifier = classifier_param_names(**architecture)
        if not classifier:
            raise UserError(
                "--freeze backbone: the classifier of a model passed as a module is not known",
                "Give a function that builds the model for a number of classes",
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in classifier)
