"""What a network costs: its parameters, and the multiply-adds of one image."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lab.models import build_model


def model_stats(*, in_chans: int, image_size: int, **architecture: Any) -> dict[str, int]:
    """`parameters` and `multiply_adds` of the network that `build_model` makes of the same.

    Multiply-adds are those of convolutions and matrix products in a forward pass of one image, as
    PyTorch's counter has them (it counts two operations each). No memory is taken for weights.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build_model(in_chans=in_chans, image_size=image_size, **architecture).eval()
        model(torch.empty(1, in_chans, image_size, image_size))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
    }
