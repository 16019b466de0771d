"""AlexNet, sized for small images."""

import torch
from torch import Tensor, nn

from lab.errors import UserError


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky, Sutskever, Hinton 2012) with 3x3 kernels, for images of about 32 pixels.

    It has the paper's five convolutions, three poolings and three dense layers, without its local
    response normalization and its strides. 14,859,082 parameters for 10 classes and 3 channels.
    """

    def __init__(self, num_classes: int, in_chans: int, image_size: int):
        super().__init__()
        if image_size < 8:
            raise UserError(f"alexnet cannot take images of {image_size} pixels", "Give 8 or more")
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 64, 3, padding=1),  # [n, 64, 32, 32]
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # [n, 64, 16, 16]
            nn.Conv2d(64, 192, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # [n, 192, 8, 8]
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # [n, 256, 4, 4]
            # Pool only if the size differs: its backward pass is not deterministic on GPUs.
            nn.Identity() if image_size // 8 == 4 else nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(256 * 4 * 4, 2048),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(2048, 2048),
            nn.ReLU(inplace=True),
            nn.Linear(2048, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, K] for images [n, C, H, W]."""
        return self.classifier(self.features(images))


@torch.no_grad()
def kaiming_init(model: nn.Module, zero_last: bool) -> None:
    """Initialize weights so that ReLUs preserve the variance of activations (He et al. 2015, 2.2).

    PyTorch's default weights are smaller: after eight layers the signal vanishes, and AlexNet's
    loss stays at log(10) for hundreds of steps. `zero_last` sets the last layer to zero: otherwise
    its logits are so large, as each max pooling selects large activations, that the first loss is
    several times log(K). Raises `UserError` if the model has no convolution or linear layer.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if not layers:
        raise UserError(
            "--init needs a model with layers of type nn.Conv2d or nn.Linear", "Leave out --init"
        )
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if zero_last:
        nn.init.zeros_(layers[-1].weight)
