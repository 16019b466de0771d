"""Number of parameters and multiply-adds of a model."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lab.models import build_without_memory


def model_stats(*, in_chans: int, image_size: int, **architecture: Any) -> dict[str, int]:
    """Return the "parameters" and "macs" of the model that `build_model` builds.

    Macs are the multiply-adds of convolutions and matrix products in a forward pass of one image,
    as counted by PyTorch's FlopCounterMode, which counts two operations each.
    """
    shape = (1, in_chans, image_size, image_size)
    model = build_without_memory(in_chans=in_chans, image_size=image_size, **architecture).eval()
    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device=device))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
    }
