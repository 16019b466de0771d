"""torchvision's ImageNet weights."""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torchvision import models

from lab.errors import UserError

# With pretrained weights, these models rescale images from ImageNet's mean and deviation to the
# range -1 to 1, as in TensorFlow. Here the first convolution includes that rescaling.
FROM_TENSORFLOW = ("googlenet", "inception_v3")
SCALE = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) / 0.5
SHIFT = (torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) - 0.5) / 0.5


def load_pretrained(model: nn.Module, source: str, heads: Collection[str]) -> list[str]:
    """Load the weights of torchvision's model `source`, except for the parameters `heads`.

    Returns messages for the user: how many tensors were loaded, which ones were adapted, and which
    keep their initial values. Raises `UserError` if the weights cannot be loaded.
    """
    weights, expected = fetch(source), model.state_dict()
    # Images are normalized to mean 0 and deviation 1, like those that the weights were trained on.
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)) + ".weight"
    if source in FROM_TENSORFLOW:
        mean = first.replace("conv.weight", "bn.running_mean")
        weights[mean] = weights[mean] - (weights[first] * SHIFT).sum((1, 2, 3))
        weights[first] = weights[first] * SCALE
    adapted = adapt_input_conv(weights[first], expected[first].shape)
    messages = []
    if adapted.shape != weights[first].shape:
        messages.append(f"{first} {list(weights[first].shape)} adapted to {list(adapted.shape)}")
        weights[first] = adapted
    # torchvision has no trained auxiliary classifiers.
    matching = {
        name: weights[name]
        for name, tensor in expected.items()
        if name in weights
        and name not in heads
        and not re.match("aux|AuxLogits", name)
        and weights[name].shape == tensor.shape
    }
    model.load_state_dict(matching, strict=False)
    missing = [n for n, _ in model.named_parameters() if n not in matching]
    messages.insert(0, f"{len(matching)} of {len(expected)} tensors loaded")
    return [*messages, f"newly initialized: {', '.join(missing)}"] if missing else messages


def adapt_input_conv(kernel: Tensor, shape: torch.Size) -> Tensor:
    """Return the center of a kernel [out, 3, h, w], cropped to `shape`.

    For one input channel, return the sum over channels, which has the same output for a gray image
    as the kernel has for three equal channels.
    """
    top, left = ((old - new) // 2 for old, new in zip(kernel.shape[2:], shape[2:], strict=True))
    kernel = kernel[:, :, top : top + shape[2], left : left + shape[3]]
    return kernel.sum(1, keepdim=True) if shape[1] == 1 else kernel


def fetch(source: str) -> dict[str, Tensor]:
    """Return torchvision's default weights of its model `source`, downloaded once on each host."""
    weights = models.get_model_weights(source).DEFAULT
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{source}.lock"):
            # torchvision's files are pickles: weights_only reads nothing but tensors from them.
            tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"torchvision's ImageNet weights of {source} cannot be loaded ({error})",
            f"Download {weights.url} elsewhere and put it into {cache}, give other weights with "
            "--init-checkpoint, or train from random ones with --no-pretrained",
        ) from error
    # DenseNet's weights have old parameter names, which torchvision's own loader converts, too.
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): tensor
        for name, tensor in tensors.items()
    }
