"""Optimizers and their parameter groups."""

from typing import Any

import torch
from torch import Tensor, nn

from lab.config.schema import TrainConfig
from lab.engine.muon import Muon, muon_parameters


def build_optimizer(
    model: nn.Module, config: TrainConfig, capturable: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that are not frozen.

    Unless `decay_biases` is set, weight decay leaves out parameters with one dimension. With
    `capturable` the learning rate is a tensor on the model's device, so that steps can be captured
    as CUDA graphs.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.decay_biases or p.ndim > 1]
    no_decay = [p for p in trained if not config.decay_biases and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    if no_decay:
        groups.append({"params": no_decay, "weight_decay": 0.0})
    # Fused: one kernel for all parameters instead of several for each.
    device = next(model.parameters()).device
    lr = torch.tensor(config.lr, device=device) if capturable else config.lr
    settings: dict[str, Any] = {"lr": lr, "fused": True}
    adam: dict[str, Any] = {"betas": (config.momentum, 0.999), "capturable": capturable}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, **adam)
    if config.optimizer == "muon":
        return Muon(_split(groups, muon_parameters(model)), **settings, **adam)
    nesterov = config.optimizer == "nesterov" and config.momentum > 0
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **settings)


def _split(groups: list[dict[str, Any]], for_muon: set[Tensor]) -> list[dict[str, Any]]:
    """Return each group split into the parameters for AdamW and for Muon, without empty groups."""
    split_groups = [
        group | {"params": [p for p in group["params"] if (p in for_muon) is muon], "muon": muon}
        for group in groups
        for muon in (False, True)
    ]
    return [group for group in split_groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    shared_lr = optimizer.param_groups[0]["lr"]
    if isinstance(shared_lr, Tensor):  # `build_optimizer` shares one tensor between all groups
        shared_lr.fill_(lr)
        return
    for group in optimizer.param_groups:
        group["lr"] = lr
