"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import Tensor, nn


class ModelEma:
    """Keep a copy of a model whose weights are an exponential moving average of the model's.

    `module` is the copy, in the same memory format and on the same device. With `warmup`, the first
    step replaces the average, and the decay grows from there, so that random initial weights are
    soon forgotten. Without it, the average starts at the initial weights. If these are pretrained,
    with a fitted classifier, the average of a short training stays between them and the fine-tuned
    weights, where it is often better than both (Wortsman et al. 2022, "Robust fine-tuning of
    zero-shot models").
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True):
        self.module, self.decay, self.warmup = copy.deepcopy(model), decay, warmup

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights that `model` has after optimizer step `step` (>= 1).

        Buffers are copied.
        """
        decay = min(self.decay, (step - 1) / (step + 9)) if self.warmup else self.decay
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, current in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(current)
