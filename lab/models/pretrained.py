"""torchvision's ImageNet weights, for its networks and for those fitted from them."""

import re
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torchvision import models

from lab.errors import UserError

# What torchvision's ports from TensorFlow do to an image before its first convolution: from
# ImageNet's mean and deviation to a range of -1 to 1. Here it is done to that convolution.
PORTED = ("googlenet", "inception_v3")
SCALE = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) / 0.5
SHIFT = (torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) - 0.5) / 0.5


def load_pretrained(model: nn.Module, source: str, heads: set[str]) -> list[str]:
    """Fills the network, but for its `heads`, with the weights of torchvision's network `source`.

    Remarks for the user: how many tensors fitted, which ones were fitted, which stay as they were.
    Raises `UserError` where the weights cannot be had.
    """
    found, expected = fetch(source), model.state_dict()
    # Images come normalised to mean 0 and deviation 1, like those that the weights were trained on.
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)) + ".weight"
    if source in PORTED:
        mean = first.replace("conv.weight", "bn.running_mean")
        found[mean] = found[mean] - (found[first] * SHIFT).sum((1, 2, 3))
        found[first] = found[first] * SCALE
    fitted = adapt_input_conv(found[first], expected[first].shape)
    changes = []
    if fitted.shape != found[first].shape:
        changes.append(f"{first} {list(found[first].shape)} cut to {list(fitted.shape)}")
        found[first] = fitted
    # torchvision has no trained auxiliary classifiers.
    taken = {
        name: found[name]
        for name, tensor in expected.items()
        if name in found
        and name not in heads
        and not re.match("aux|AuxLogits", name)
        and found[name].shape == tensor.shape
    }
    model.load_state_dict(taken, strict=False)
    fresh = [n for n, _ in model.named_parameters() if n not in taken]
    remarks = [f"{len(taken)} of {len(expected)} tensors taken over", *changes]
    return [*remarks, f"new: {', '.join(fresh)}"] if fresh else remarks


def adapt_input_conv(kernel: Tensor, shape: torch.Size) -> Tensor:
    """The centre of a kernel [out, 3, h, w], as large as `shape`; for one channel, their sum.

    A grey image has three equal channels: their filters' sum says the same of it.
    """
    rows, columns = (
        (have - want) // 2 for have, want in zip(kernel.shape[2:], shape[2:], strict=True)
    )
    kernel = kernel[:, :, rows : rows + shape[2], columns : columns + shape[3]]
    return kernel.sum(1, keepdim=True) if shape[1] == 1 else kernel


def fetch(source: str) -> dict[str, Tensor]:
    """torchvision's default weights of its network `source`, downloaded once a host."""
    weights = models.get_model_weights(source).DEFAULT
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{source}.lock"):
            # weights_only: its files are pickles, of which nothing but tensors is read.
            tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"torchvision's ImageNet weights of {source} cannot be had ({error})",
            f"Download {weights.url} elsewhere and put it into {cache}, or leave --pretrained out",
        ) from error
    # DenseNet's are older than its modules' names, as torchvision's own loader says.
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): tensor
        for name, tensor in tensors.items()
    }
