"""The optimizer, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lab.config import TrainConfig
from lab.muon import Muon, muon_parameters


def build_optimizer(
    network: nn.Module, config: TrainConfig, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """The optimizer over what is not frozen; unless `decay_biases`, decay spares 1-d parameters.

    Where a `device` is given, its steps can be recorded as a CUDA graph: it reads the learning rate
    there.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.decay_biases or p.ndim > 1]
    spared = [p for p in trained if not config.decay_biases and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    # Fused: one kernel for all parameters instead of several for each.
    lr = config.lr if device is None else torch.tensor(config.lr, device=device)
    settings: dict[str, Any] = {"lr": lr, "fused": True}
    adam: dict[str, Any] = {"betas": (config.momentum, 0.999), "capturable": device is not None}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, **adam)
    if config.optimizer == "muon":
        return Muon(_split(groups, muon_parameters(network)), **settings, **adam)
    nesterov = config.optimizer == "nesterov" and config.momentum > 0
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **settings)


def _split(groups: list[dict[str, Any]], chosen: set[Tensor]) -> list[dict[str, Any]]:
    """The groups cut in two by whether Muon steps their parameters; empty ones are left out."""
    cut = [
        group | {"params": [p for p in group["params"] if (p in chosen) is muon], "muon": muon}
        for group in groups
        for muon in (False, True)
    ]
    return [group for group in cut if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Has the next step use this learning rate."""
    shared = optimizer.param_groups[0]["lr"]
    if isinstance(shared, Tensor):  # of all groups, as `build_optimizer` made it
        shared.fill_(lr)
        return
    for group in optimizer.param_groups:
        group["lr"] = lr


def slots(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, torch.Size]]:
    """What the optimizer keeps of each parameter that it trains: slots and their shapes."""
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "betas" in group and not group.get("muon"):
                found[p] = {"exp_avg": p.shape, "exp_avg_sq": p.shape, "step": torch.Size()}
            else:
                found[p] = {"momentum_buffer": p.shape}
    return found


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0 over the whole run.

    Accelerate's wrapped schedulers advance once a process; a function of the step cannot.
    After `warmup_epochs` of linear rise: `constant`; `step`, times `lr_gamma` every
    `lr_step_epochs`; `cosine`, to 0 at the end (Loshchilov, Hutter 2017, without restarts);
    `one-cycle`, linearly to 0 (Smith, Topin 2018, one triangle). The end is that of `epochs`,
    whether or not `max_steps` comes before it.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.lr_gamma ** (step // steps_per_epoch // config.lr_step_epochs)
    total_steps = config.epochs * steps_per_epoch
    progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    progress = min(1.0, max(0.0, progress))
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (1 - progress)
