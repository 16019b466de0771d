"""Number of parameters and multiply-adds of a model."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lab.models import build_model


def model_stats(*, in_chans: int, image_size: int, **architecture: Any) -> dict[str, int]:
    """Return the "parameters" and "macs" of the model that `build_model` builds.

    Macs are the multiply-adds of convolutions and matrix products in a forward pass of one image,
    as counted by PyTorch's FlopCounterMode, which counts two operations each. No memory is
    allocated for weights.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build_model(in_chans=in_chans, image_size=image_size, **architecture).eval()
        model(torch.empty(1, in_chans, image_size, image_size))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
    }
