"""A linear probe: logistic regression on the features of a pretrained model."""

from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from lab import console
from lab.config.schema import TrainConfig
from lab.data.loaders import Loader, LoaderOptions, build_loader, eval_batch_size
from lab.data.splits import Splits
from lab.data.stratification import subsample
from lab.data.transforms import BatchTransform
from lab.distributed import no_cudnn_benchmark
from lab.errors import UserError
from lab.models import classifier_param_names

MAX_IMAGES = 10_000  # maximum number of training images that the classifier is fitted on
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # L2: factors of half the sum of squared weights
NUM_FOLDS = 5  # of the cross-validation that selects one of them
MANY_IMAGES = 2_000  # from this number on, one of the folds is enough
MAX_ITERATIONS = 200


def find_classifier(
    config: TrainConfig, model: nn.Module, architecture: dict[str, Any]
) -> nn.Linear | None:
    """Return the layer that --linear-probe fits: the single linear classifier, with a bias.

    Return None if the option is not given, or if the model has no such layer. `architecture`
    contains the arguments of `build_model` for this model.
    """
    if not config.linear_probe:
        return None
    modules = {name.rpartition(".")[0] for name in classifier_param_names(**architecture)}
    layer = model.get_submodule(modules.pop()) if len(modules) == 1 else None
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        return layer
    console.info(f"--linear-probe has no effect: {config.model} has no single linear classifier")
    return None


@torch.no_grad()
def fit_classifier(
    accelerator: Accelerator,
    model: nn.Module,
    classifier: nn.Linear,
    splits: Splits,
    config: TrainConfig,
    options: LoaderOptions,
) -> None:
    """Fit the `classifier` of a pretrained model to the training split, and print its accuracy.

    Fine-tuning that starts with a fitted classifier distorts the features less than with a random
    one (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution"). Images are not augmented. If there are more than `MAX_IMAGES`, a
    stratified sample is used. The penalty is selected by `select_penalty`. The result is the same
    on any number of processes.
    """
    device = accelerator.device
    loader = build_loader(
        subsample(splits.train, MAX_IMAGES, config.split_seed),
        BatchTransform(splits.mean, splits.std, (), device),
        options,
        batch_size=eval_batch_size(device, config.image_size),
        seed=None,
    )
    with closing(loader), console.status("computing the features of the training images"):
        features, labels = _features(accelerator, model, classifier, loader)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-3)
    inputs, num_classes = (features - mean) / std, len(classifier.weight)
    with console.status("fitting the classifier"):
        penalty = select_penalty(inputs, labels, num_classes)
        weight, bias = fit_logistic_regression(inputs, labels, num_classes, penalty)
    weight = weight / std
    classifier.weight.copy_(weight)
    classifier.bias.copy_(bias - weight @ mean)
    if accelerator.num_processes > 1:
        broadcast(classifier.weight.data)
        broadcast(classifier.bias.data)
    logits = F.linear(features, classifier.weight, classifier.bias)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    console.info(
        f"linear probe: accuracy {accuracy:.4f} on {len(labels):,} training images, "
        f"penalty {penalty:g}"
    )


def _features(
    accelerator: Accelerator, model: nn.Module, classifier: nn.Linear, loader: Loader
) -> tuple[Tensor, Tensor]:
    """Return the inputs of the classifier, float32 [N, D], and the labels int64 [N] of a split.

    Raises `UserError` if the classifier has more than one input per image.
    """
    inputs: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float()))
    # The last column holds the labels.
    shape = (loader.sampler.num_samples, classifier.in_features + 1)
    table = torch.zeros(shape, device=accelerator.device)
    was_training = model.training
    model.eval()
    # A compiled model would not call the hook.
    eager = torch.compiler.set_stance("force_eager")
    with accelerator.autocast(), no_cudnn_benchmark(), eager:
        for batch in loader.batches():
            inputs.clear()
            model(batch.images)
            if inputs[0].ndim != 2:
                raise UserError(
                    f"--linear-probe needs one vector of features per image, not "
                    f"{list(inputs[0].shape[1:])}",
                    "Give --no-linear-probe",
                )
            table.index_add_(0, batch.indices, torch.cat((inputs[0], batch.labels[:, None]), 1))
    hook.remove()
    model.train(was_training)
    table = accelerator.reduce(table)
    return table[:, :-1], table[:, -1].long()


def select_penalty(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return the one of `PENALTIES` with the smallest loss in cross-validation.

    The loss is the mean over the classes of the mean cross-entropy of their held-out images, so
    that rare classes count as much as frequent ones, as in macro-F1. Features that separate the
    classes well, as for photographs of objects like those in ImageNet, need a small penalty, and
    others a large one.
    """
    # Image i of each class is held out in fold i modulo NUM_FOLDS.
    ranks = F.one_hot(labels, num_classes).cumsum(0).gather(1, labels[:, None])[:, 0]
    losses = features.new_zeros(len(PENALTIES), num_classes)
    counts = features.new_zeros(num_classes)
    for fold in range(1 if len(labels) >= MANY_IMAGES else NUM_FOLDS):
        held_out = ranks % NUM_FOLDS == fold
        start = None
        counts += labels[held_out].bincount(minlength=num_classes)
        for i, penalty in enumerate(PENALTIES):
            start = fit_logistic_regression(
                features[~held_out], labels[~held_out], num_classes, penalty, start,
                max_iterations=MAX_ITERATIONS // 4,
            )  # fmt: skip
            logits = F.linear(features[held_out], *start)
            loss = F.cross_entropy(logits, labels[held_out], reduction="none")
            losses[i].index_add_(0, labels[held_out], loss)
    measured = counts > 0
    means = (losses[:, measured] / counts[measured]).mean(1)
    return PENALTIES[int(means.argmin())] if measured.any() else PENALTIES[0]


@torch.enable_grad()
def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Return the weight [K, D] and the bias [K] of multinomial logistic regression.

    L-BFGS minimizes the mean cross-entropy plus `penalty` / 2 times the sum of squared weights,
    beginning at `start` or at zero.
    """
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_zeros(num_classes)
    if start is not None:
        weight, bias = (parameter.clone() for parameter in start)
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
