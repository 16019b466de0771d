"""The weights that torchvision and timm publish."""

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from lab.config.schema import TIMM
from lab.errors import UserError, first_line

# With pretrained weights, these models rescale images from ImageNet's mean and deviation to the
# range -1 to 1, as in TensorFlow. Here the first convolution includes that rescaling.
FROM_TENSORFLOW = ("googlenet", "inception_v3")
SCALE = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) / 0.5
SHIFT = (torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) - 0.5) / 0.5


def load_pretrained(
    model: nn.Module, source: str, heads: Collection[str], architecture: Mapping[str, Any]
) -> list[str]:
    """Load the weights of a torchvision model or of `timm:NAME`, except for the parameters `heads`.

    `architecture` contains the arguments of `build_model` for this model.
    Returns messages for the user: how many tensors were loaded, which ones were adapted, and which
    keep their initial values. Raises `UserError` if the weights cannot be loaded.
    """
    if source.startswith(TIMM):
        return _load_timm(model, source.removeprefix(TIMM), heads, architecture)
    weights, expected = fetch(source), model.state_dict()
    # Images are normalized to mean 0 and deviation 1, like those that the weights were trained on.
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)) + ".weight"
    if source in FROM_TENSORFLOW:
        mean = first.replace("conv.weight", "bn.running_mean")
        weights[mean] = weights[mean] - (weights[first] * SHIFT).sum((1, 2, 3))
        weights[first] = weights[first] * SCALE
    adapted = {first: adapt_input_conv(weights[first], expected[first].shape)}
    if isinstance(model, VisionTransformer):
        position = interpolate_embeddings(model.image_size, model.patch_size, OrderedDict(weights))
        adapted["encoder.pos_embedding"] = position["encoder.pos_embedding"]
    messages = [
        f"{name} {list(weights[name].shape)} adapted to {list(tensor.shape)}"
        for name, tensor in adapted.items()
        if tensor.shape != weights[name].shape
    ]
    weights |= adapted
    # torchvision has no trained auxiliary classifiers.
    matching = {
        name: weights[name]
        for name, tensor in expected.items()
        if name in weights
        and name not in heads
        and not re.match("aux|AuxLogits", name)
        and weights[name].shape == tensor.shape
    }
    loaded, *missing = _load(model, matching)
    return [loaded, *messages, *missing]


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Load these tensors into the model, and return messages about them and about the others."""
    model.load_state_dict(tensors, strict=False)
    missing = [name for name, _ in model.named_parameters() if name not in tensors]
    messages = [f"{len(tensors)} of {len(model.state_dict())} tensors loaded"]
    return [*messages, f"newly initialized: {', '.join(missing)}"] if missing else messages


def _load_timm(
    model: nn.Module, name: str, heads: Collection[str], architecture: Mapping[str, Any]
) -> list[str]:
    """Load the weights of timm's model `name`, which timm adapts to the images' size and channels.

    timm reads a pickle if a repository has no safetensors file; this function does not.
    """
    from huggingface_hub import hf_hub_download

    from lab.models.external import create_timm_model, import_timm

    repository = import_timm().models.get_pretrained_cfg(name).hf_hub_id
    try:
        tensors = safetensors.torch.load_file(hf_hub_download(repository, "model.safetensors"))
    except (OSError, SafetensorError) as error:  # the Hub's errors are OSErrors
        raise UserError(
            f"timm's weights {repository} cannot be loaded ({first_line(error)})",
            "Connect to the Hugging Face Hub, give other weights with --init-checkpoint, or train "
            "from random ones with --no-pretrained",
        ) from error
    shape = (architecture[key] for key in ("num_classes", "in_chans", "image_size"))
    overlay = {"state_dict": tensors}
    source = create_timm_model(name, *shape, pretrained=True, pretrained_cfg_overlay=overlay)
    return _load(model, {k: v for k, v in source.state_dict().items() if k not in heads})


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
