"""Optimizers and their parameter groups."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lab.config.schema import TrainConfig
from lab.cuda_graph import can_capture_steps
from lab.engine.muon import Muon, muon_parameters


def build_optimizer(
    model: nn.Module, config: TrainConfig, accelerator: Accelerator | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that are not frozen.

    Unless `decay_biases` is set, weight decay leaves out parameters with one dimension. If steps
    are captured as CUDA graphs, learning rates are tensors on the model's device.
    """
    capturable = accelerator is not None and can_capture_steps(accelerator, config)
    device = next(model.parameters()).device
    groups: list[dict[str, Any]] = []
    for scale, parameters in layer_scales(model, config.layer_decay).items():
        for decays in (True, False):
            members = [p for p in parameters if (config.decay_biases or p.ndim > 1) is decays]
            if members:
                lr = torch.tensor(scale * config.lr, device=device) if capturable else config.lr
                weight_decay = config.weight_decay if decays else 0.0
                group = dict(params=members, weight_decay=weight_decay, lr=lr, lr_scale=scale)
                groups.append(group)
    # Fused: one kernel for all parameters instead of several for each. With GradScaler this kernel
    # would skip the step by itself, without Accelerate noticing it.
    settings: dict[str, Any] = {"fused": accelerator is None or accelerator.scaler is None}
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


def layer_scales(model: nn.Module, layer_decay: float) -> dict[float, list[nn.Parameter]]:
    """Return the trained parameters by the factor of their learning rate.

    The last block of the model has factor 1, each block before it `layer_decay` times the factor of
    the next (Bao et al. 2022, "BEiT", and Howard, Ruder 2018 before it). A block is all parameters
    with the same name up to its first part with a digit, such as `features.3`, `layer1` or
    `encoder.layers.encoder_layer_0`, or those of one module if there is no digit, such as
    `encoder.ln`. The blocks are in the order of `model.parameters()`. The models of timm define
    their blocks themselves.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if layer_decay == 1:
        return {1.0: [p for _, p in trained]}
    if hasattr(model, "group_matcher"):
        from timm.optim import param_groups_layer_decay

        scales: dict[float, list[nn.Parameter]] = {}
        for group in param_groups_layer_decay(model, layer_decay=layer_decay):
            scales.setdefault(group["lr_scale"], []).extend(group["params"])
        return scales
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained:
        parts = name.split(".")
        ends = (i for i, part in enumerate(parts, 1) if any(map(str.isdigit, part)))
        end = next(ends, max(1, len(parts) - 1))
        blocks.setdefault(".".join(parts[:end]), []).append(parameter)
    last = len(blocks) - 1
    return {layer_decay ** (last - i): block for i, block in enumerate(blocks.values())}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate, times the factor of each parameter group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
