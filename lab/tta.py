"""Test-time augmentation: what a network says of a picture and its mirror image together."""

import math

import torch
from torch import Tensor, nn


def outputs(network: nn.Module, images: Tensor, tta: str) -> Tensor:
    """The network's logits float32 [n, K] of images [n, C, H, W].

    With `tta` "flip", logarithms of class probabilities: the mean of the softmax for each image and
    for it mirrored left to right, as Krizhevsky et al. 2012 (section 4.1) average those of patches
    and their reflections. They serve as logits: their softmax is the mean.
    """
    logits = network(images).float()
    if tta == "none":
        return logits
    mirrored = network(images.flip(3)).float()
    return torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1)) - math.log(2)
