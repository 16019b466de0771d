"""Muon: orthogonalized updates for the weights of hidden layers, AdamW for all others."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lab.distributed import has_native_bf16

# A quintic whose iteration drives singular values in (0, 1] to about 1 (Jordan et al. 2024).
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
MOMENTUM = 0.95  # the paper's; `--momentum` is AdamW's
# AdamW updates wider matrices, as the cost of an iteration grows with the square of the smaller
# side: AlexNet's dense layers would take 688 GFLOP, and a whole step of 128 images takes 138.
MAX_MATRIX_WIDTH = 1024


def muon_parameters(model: nn.Module) -> set[Tensor]:
    """Return the weights that Muon updates: those of all layers but the first and the last."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = [layer.weight for layer in layers[1:-1]]
    return {w for w in weights if w.requires_grad and min(len(w), w[0].numel()) <= MAX_MATRIX_WIDTH}


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

    Updates the groups whose "muon" is True by orthogonalized momentum, the others by AdamW. Kernels
    [O, I, H, W] are treated as matrices [O, I * H * W]. Updates are scaled to the root mean square
    of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so that both use
    the same learning rate. `torch.optim.Muon` accepts matrices only, neither kernels nor parameters
    that AdamW updates.

    The iterations magnify rounding differences between processes, most of all in bfloat16: the loss
    curves of 1, 2 and 3 processes agree to 1e-4 over tens of steps, but the number of correct
    predictions may differ.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any):
        super().__init__(groups, **settings)
        # GradScaler must unscale fp16 gradients before the step: only AdamW's fused kernel could.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._muon_update(parameter, group["lr"], group["weight_decay"])
        return loss

    def _muon_update(self, parameter: Tensor, lr: float | Tensor, weight_decay: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
        update = parameter.grad.lerp(buffer, MOMENTUM)  # Nesterov momentum
        matrix = zeropower_via_newtonschulz(update.flatten(1))
        scale = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(matrix.view(parameter.shape) * (lr * scale))


def zeropower_via_newtonschulz(matrix: Tensor) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrix to `matrix` [m, n].

    Its singular values are about 0.7 to 1.2. The Newton-Schulz iterations run in bfloat16, or in
    float32 on devices without native bfloat16, where emulation takes 26 times as long
    (benchmarks/RESULTS.md).
    """
    a, b, c = NS_COEFFICIENTS
    tall = len(matrix) > matrix.shape[1]
    dtype = torch.bfloat16 if has_native_bf16(matrix.device.type) else torch.float32
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
